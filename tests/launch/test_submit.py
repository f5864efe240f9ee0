"""What is refused before anything is submitted, the script, and the verdict on a start; no Slurm needed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.config.schema import SourceConfig
from megahybrid.errors import MachineFault, UserError
from megahybrid.launch import verdict
from megahybrid.launch.profile import FOLDER, Profile, load_profile
from megahybrid.launch.script import Job, render_following
from megahybrid.launch.submit import Request, _elsewhere
from megahybrid.launch.submit import submit as submit_runs
from megahybrid.launch.task import places
from megahybrid.training import attempts, failures
from megahybrid.training.run_directory import RunDirectory
from tests.data.corpora import make_config
from tools.workers import environment, python


def submit(recipe, *arguments) -> int:
    return main(["submit", str(recipe), "--gpus-per-node", "2", *arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["parallel.tensor=4"],
            "are 2, which is no multiple of parallel.tensor * parallel.context * parallel.pipeline = 4",
        ),
        (["--nodes", "3", "train.micro_batch_size=1"], "times the data parallel size (1 * 6)"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.micro_batch_size=8"],
            "a replica's micro-batches a step (1) must be a multiple of parallel.pipeline (2)",
        ),
        (["train.stepz=3"], "stepz"),
        (["--profile", "no-such-cluster"], "There is no profile"),
        (["--array", "optimizer.learning_rate"], "give it as key=value,value"),
        (["--array", "train.seed=1,2", "--chain", "2"], "do not go together"),
        (["data.path=/nowhere"], "run `megahybrid prepare"),
        (["model.vocab_size=300"], "more than model.vocab_size (300)"),
        (["data.identity='0123456789abcdef'"], "but data.identity is 0123456789abcdef"),
        (["train.init_from=/nowhere"], "train.init_from: there is no checkpoint in '/nowhere'"),
        (["run.dir=a:b"], "ends a folder at each ':'"),
        (["run.dir=a\\b"], "takes no backslashes"),
        (["--time", "1:00\n#SBATCH --account=x"], "The profile's time has"),
        (["--chain", "0"], "at least 1"),
        (["--then", "train"], "--then has 'train'; give eval, harness, export"),
        (["--then", "export --push-ready me/tiny"], "--push-ready wants a licence"),
        (["--then", "export,eval"], "The recipe has no tasks in data.sources; name some with --task"),
        (["--then", "eval --task niah_single_1 --lengths 4x"], "--lengths has '4x'"),
        (["--then", "eval --task niah_single_1 --lengths 64"], "tokens or more with this tokenizer, not 64"),
        (["--then", "harness --tasks arc_easy"], "lm-evaluation-harness cannot be imported"),
    ],
)
def test_what_cannot_work_is_refused(recipe, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "megahybrid.evaluation.harness", raising=False)
    assert submit(recipe, "--dry-run", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_host_without_slurm_is_told_so(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(recipe) == 2
    assert "run this on a host of a Slurm cluster" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_script_says_what_was_asked_for(recipe, tmp_path, capsys):
    profile = tmp_path / "cluster.yaml"
    profile.write_text(
        "partition: gpu\naccount: me\nsetup: [module load x]\nenvironment: {NCCL_SOCKET_IFNAME: ib0}\n"
        "python: [apptainer, exec, 'an image.sif', python]\nsbatch: [--exclusive]\n"
    )
    two_nodes = "--nodes", "2", "--time", "1:00:00", "train.micro_batch_size=2"
    assert submit(recipe, "--dry-run", "--profile", str(profile), *two_nodes) == 0
    script = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=1:00:00",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --requeue",
        "#SBATCH --exclusive",
        "PYTHON=(apptainer exec 'an image.sif' python)",
        "export PYTHONPATH=''",
        "export NCCL_SOCKET_IFNAME=ib0",
        "module load x",
        "ON_STOP=requeue",
    ):
        assert line in script.splitlines(), line
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert submit(recipe, "--dry-run", "--chain", "2") == 0
    assert {"ON_STOP=exit", "#SBATCH --no-requeue"} <= set(capsys.readouterr().out.splitlines())
    assert submit(recipe, "--dry-run", "--array", "train.seed=1,2,3") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-2" in script and f"RUN_DIRS=({tmp_path}/run/seed=1 " in script


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("partition: 'a b'", '#SBATCH "--partition=a b"'),
        ("account: me#1", '#SBATCH "--account=me#1"'),  # sbatch would charge "me"
        ("sbatch: ['--constraint=a\"b\\c']", '#SBATCH "--constraint=a\\"b\\\\c"'),
        ("gpu_type: h100", "#SBATCH --gpus-per-node=h100:2"),
        ('account: "me\\n#SBATCH --nodes=9"', "The profile's account has '--account=me\\n#SBATCH --nodes=9'"),
        ("sbatch: [--exclusive --mem=0]", "The profile's sbatch has '--exclusive --mem=0'; write one option an entry"),
        ("sbatch: ['# --mem=0']", "The profile's sbatch has '# --mem=0'"),
        ("sbatch: ['-C=h100']", "The profile's sbatch has '-C=h100'"),
        ("environment: {A-B: c}", "The profile's environment has 'A-B', which cannot name a variable"),
    ],
)
def test_values_of_a_profile_stay_whole_or_are_refused(profile, said, recipe, tmp_path, capsys):
    (tmp_path / "cluster.yaml").write_text(profile + "\n")
    code = submit(recipe, "--dry-run", "--profile", str(tmp_path / "cluster.yaml"))
    script, refusal = capsys.readouterr()
    if said.startswith("#"):
        assert code == 0 and said in script.splitlines()
    else:
        assert code == 2 and said in refusal and refusal.count("\n") == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in (FOLDER / "profiles").glob("*.yaml")))
def test_every_profile_gives_a_script_that_shellcheck_passes(name, recipe, capsys):
    assert load_profile(name).gpus_per_node >= 1
    assert submit(recipe, "--dry-run", "--profile", name) == 0
    shellcheck(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["train", "then"])
def test_shellcheck_passes_the_template(name):
    shellcheck((FOLDER / f"{name}.sbatch").read_text())


def shellcheck(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_wrong_profile_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("gpus: 8\n")
    with pytest.raises(UserError, match="cannot be read: Key 'gpus'"):
        load_profile(str(path))


def test_a_task_finds_its_place():
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}
    assert places(slurm) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    return RunDirectory(tmp_path / "run")


@pytest.mark.parametrize(
    ("state", "reason", "code"),
    [("done", "", 0), ("stopped", "SIGUSR1", verdict.GO_ON), ("stopped", "SIGTERM", 0), ("running", "", verdict.GO_ON)],
)
def test_the_verdict_follows_the_status(run, state, reason, code):
    run.write_status(state, 3, 20, reason)
    assert verdict.judge(run, 0)[0] == code


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("odd"), 1), (UserError("No."), 1), (MachineFault("Rank 1 died."), verdict.GO_ON)],
)
def test_only_machines_are_tried_again(run, error, code):
    run.write_status("running", 3, 20)
    failures.record(run, error, 4)
    failures.record(run, RuntimeError("what came after it"))
    assert run.failure.read_text().startswith(failures.describe(error) + "\n")
    status = run.read_status()
    assert (status["state"], status["step"], status["target"]) == ("failed", 4, 20)
    said = verdict.judge(run, 1)
    assert said[0] == code and failures.describe(error) in said[1]


def test_a_start_that_never_trained_is_not_taken_for_the_one_before(run, monkeypatch):
    run.write_status("done", 20, 20)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    code, said = verdict.judge(run, 1)
    assert code == 1 and "before training began" in said
    assert run.read_status()["state"] == "failed"


def test_restarts_without_progress_end(run, monkeypatch):
    assert attempts.begin(run, 0, 4, restarts=2) is None and attempts.read(run) == []  # by hand: not counted
    monkeypatch.setenv("MEGAHYBRID_SUBMISSION", "one")
    assert [attempts.begin(run, 0, 4, 2) for _ in range(3)] == [None] * 3
    assert "started 3 times from step 0" in attempts.begin(run, 0, 4, 2)
    assert attempts.begin(run, 5, 4, 2) is None
    monkeypatch.setenv("MEGAHYBRID_SUBMISSION", "two")
    assert attempts.begin(run, 5, 4, 2) is None


def stub_slurm(folder, refused: int):
    """Slurm's commands: sbatch refuses its `refused`-th job; what they were called with is in calls.txt."""
    stubs = {
        "squeue": "echo '{\"jobs\": []}'",
        "scancel": 'echo "scancel $*" >>calls.txt',
        "sbatch": """
[[ $1 == --test-only ]] && exit 0
echo "sbatch $(ls run/submit/*/job.json) ${*:2:$#-2}" >>calls.txt
number=$(grep -c ^sbatch calls.txt)
((number == REFUSED)) && { echo 'QOSMaxSubmitJobPerUserLimit' >&2; exit 1; }
echo "10$number"
""".replace("REFUSED", str(refused)),
    }
    (folder / "bin").mkdir()
    for name, body in stubs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\ncd {folder}\n{body}\n")
        (folder / "bin" / name).chmod(0o755)


def test_a_chain_that_is_refused_in_part_is_taken_back(recipe, tmp_path, monkeypatch, capsys):
    """Slurm knows no job of which the run directory does not, and keeps none of a chain that is not whole."""
    stub_slurm(tmp_path, refused=3)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert submit(recipe, "--chain", "4") == 2
    assert "QOSMaxSubmitJobPerUserLimit" in capsys.readouterr().err
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert [line.partition(" ")[0] for line in calls] == ["sbatch"] * 3 + ["scancel"] * 2
    assert all("/job.json " in line for line in calls[:3])  # recorded before it was submitted
    assert calls[1].endswith("--dependency=afterany:101") and calls[2].endswith("--dependency=afterany:102")
    assert calls[3:] == ["scancel 102", "scancel 101"]
    assert not list((tmp_path / "run" / "submit").iterdir())


def test_a_chain_is_recorded_job_by_job(recipe, tmp_path, monkeypatch):
    stub_slurm(tmp_path, refused=9)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert submit(recipe, "--chain", "3") == 0
    (facts,) = (tmp_path / "run" / "submit").glob("*/job.json")
    assert json.loads(facts.read_text())["jobs"] == ["101", "102", "103"]


def test_what_follows_waits_for_all_jobs_of_a_chain(recipe, tmp_path, monkeypatch, capsys):
    stub_slurm(tmp_path, refused=9)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    evaluation = "eval --task selective_mqar --set 'pairs=3'"
    assert submit(recipe, "--chain", "2", "--then", evaluation, "--then", "export") == 0
    said = capsys.readouterr().out
    assert "Submitted job 101, then 102." in said
    assert f"What follows: job 103, {tmp_path}/run/logs/then_103.out" in said
    assert (tmp_path / "calls.txt").read_text().splitlines()[2].endswith(" --dependency=afterany:101:102")
    (folder,) = (tmp_path / "run" / "submit").iterdir()
    assert json.loads((folder / "job.json").read_text())["jobs"] == ["101", "102"]  # that train the run
    script = (folder / "then.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    comment = json.loads((folder / "job.json").read_text())["submission"]
    for line in (
        f"#SBATCH --comment={comment}-then",
        "#SBATCH --nodes=1",
        "#SBATCH --gpus-per-node=1",
        f"CONFIGS=({folder}/config.yaml)",
        "ON_STOP=exit",
        "THEN=('eval --task selective_mqar --set '\"'\"'pairs=3'\"'\"'' export)",
    ):
        assert line in script.splitlines(), line


@pytest.mark.parametrize(
    ("queued", "arguments", "said"),
    [
        ("", ["--then", "export"], "Job 9 trains"),
        ("-then", ["--then", "export"], "Job 9 follows"),
        ("-then", [], None),
    ],
)
def test_what_is_in_the_queue_already(recipe, tmp_path, monkeypatch, capsys, queued, arguments, said):
    stub_slurm(tmp_path, refused=9)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "run" / "submit" / "before").mkdir(parents=True)
    (tmp_path / "run" / "submit" / "before" / "job.json").write_text('{"submission": "run-1", "jobs": ["8"]}')
    job = {"job_id": 9, "job_state": "PENDING", "comment": f"run-1{queued}"}
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/bash\necho '{json.dumps({'jobs': [job]})}'\n")
    assert submit(recipe, *arguments) == (2 if said else 0)
    assert (said or "") in capsys.readouterr().err


@pytest.mark.parametrize(
    "mem, share",
    [("512G", "65536M"), ("1000", "125M"), ("1t", "131072M"), ("100K", "1M"), ("0", None), (None, None), ("x", "x")],
)
def test_what_follows_asks_for_one_gpus_share_of_a_node(tmp_path, mem, share):
    options = ["--exclusive", "--exclusive=user", "--mem=0", "--mem-per-gpu=9G", "--constraint=h100"]
    profile = Profile(gpus_per_node=8, cpus_per_gpu=12, mem=mem, sbatch=options)
    job = Job("a", "b", [tmp_path], [tmp_path], tmp_path, 4, True, tmp_path / "slurm_%j.out")
    lines = render_following(job, profile, ["export"]).splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"nodes=1", "ntasks-per-node=1", "gpus-per-node=1", "cpus-per-task=12"} <= asked
    kept = {"mem-per-gpu=9G", "constraint=h100"} | ({f"mem={share}"} if share else set())
    assert {each for each in asked if each.startswith(("mem", "exclusive", "constraint"))} == kept


def test_a_chain_is_taken_back_where_what_follows_is_refused(recipe, tmp_path, monkeypatch):
    stub_slurm(tmp_path, refused=2)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert submit(recipe, "--then", "export") == 2
    assert (tmp_path / "calls.txt").read_text().splitlines()[2:] == ["scancel 101"]
    assert not list((tmp_path / "run" / "submit").iterdir())


def test_runs_of_different_recipes_are_one_array_after_another_job(recipe, tmp_path, monkeypatch):
    stub_slurm(tmp_path, refused=9)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("megahybrid.launch.pinned.pin", lambda folder: folder.mkdir(parents=True))
    runs = [tmp_path / "run" / name for name in "ab"]
    configs = [
        load_config(recipe, [f"run.dir={run}", f"model.hidden_size={width}"])
        for run, width in zip(runs, (32, 64), strict=True)
    ]
    profile = dataclasses.replace(load_profile("generic"), gpus_per_node=1)
    submission = submit_runs(Request(configs, profile, "a study", folder=tmp_path / "study", after="7_2"))
    assert submission.numbers == ["101"] and "#SBATCH --array=0-1" in submission.scripts["job.sbatch"]
    script = submission.scripts["job.sbatch"]
    assert f"CODE={tmp_path}/study/submit/" in script and "--job-name=study" in script
    (call,) = (tmp_path / "calls.txt").read_text().splitlines()
    assert call.endswith("--dependency=afterok:7_2 --kill-on-invalid-dep=yes")
    for number, run in enumerate(runs):
        (facts,) = run.glob("submit/*/job.json")
        assert json.loads(facts.read_text())["element"] == number
        assert load_config(facts.parent / "config.yaml").model.hidden_size == configs[number].model.hidden_size


def test_a_step_back_that_is_not_possible_is_refused(recipe, tmp_path, capsys):
    assert submit(recipe, "--dry-run", "train.resume_from=3") == 2
    assert "has no checkpoint of that step; it has none" in capsys.readouterr().err


HANGS = """
import sys, time
from megahybrid.config.schema import WatchConfig
from megahybrid.training.run_directory import RunDirectory
from tests.launch.conftest import ROOT
from megahybrid.training.watchdog import Watchdog

def a_long_wait():
    time.sleep(60)

run = RunDirectory(sys.argv[1])
with Watchdog(run, WatchConfig(step_seconds=1), int(sys.argv[2]), grace=3) as watchdog:
    watchdog.beat(5)
    a_long_wait()
"""


def test_a_hang_ends_all_processes_with_their_stacks(tmp_path):
    command = [python(), "-c", HANGS, str(tmp_path)]
    both = [subprocess.Popen([*command, rank], env=environment(), stderr=subprocess.DEVNULL) for rank in "01"]
    assert [process.wait(60) for process in both] == [1, 1]
    for rank in range(2):
        assert "in a_long_wait" in (tmp_path / "logs" / f"rank_0000{rank}.log").read_text()
    failure = (tmp_path / "logs" / "failure.txt").read_text()
    assert failure.startswith("No progress for ") and "step 5, training, at <string>" in failure
    status = json.loads((Path(tmp_path) / "status.json").read_text())
    assert (status["state"], status["again"]) == ("failed", True)


def test_a_job_reads_the_same_files_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters, stages = {"haystack": "a.txt", "shift": True}, [{"until": 5, "haystack": "b.txt"}, {"length": 64}]
    task = SourceConfig(format="task", task="niah_single_2", weight=1, parameters=parameters, stages=stages)
    config = make_config(tmp_path, {"needles": task}, tokenizer="tokens")
    config.data.path = "texts"
    config.train.branch_from = "trunk@6"
    there = _elsewhere(config, tmp_path / "run")
    data = there.data
    assert (there.train.init_from, there.train.branch_from) == (None, str(tmp_path / "trunk@6"))
    assert (data.path, data.tokenizer) == (str(tmp_path / "texts"), str(tmp_path / "tokens"))
    assert data.sources["needles"].parameters == {"haystack": str(tmp_path / "a.txt"), "shift": True}
    assert data.sources["needles"].stages == [{"until": 5, "haystack": str(tmp_path / "b.txt")}, {"length": 64}]
