"""The job script on a real Slurm, with a short shell script in Python's place: signals, job arrays, odd names."""

import json
import subprocess

import pytest

from megahybrid.cli import main
from megahybrid.launch import slurm
from tests.launch.test_slurm_lab import ENDED, wait, wait_for

PROGRAM = """
folder="$(dirname "$0")"
me="$folder/${SLURM_ARRAY_TASK_ID:-0}-${SLURM_RESTART_COUNT:-0}"
if [[ $2 == *.verdict ]]; then
    [[ -e $me.stopped ]] && exit 75
    exit 0
fi
trap 'echo training, step "$SLURM_STEP_ID" >"$me.stopped"; exit 0' USR1
touch "$me.started"
for _ in {1..60}; do
    [[ -e $folder/end || ${SLURM_RESTART_COUNT:-0} != 0 ]] && exit 0
    sleep 0.1
done
"""
MONITOR = (
    "trap 'touch \"{0}/monitor.stopped\"' USR1; touch '{0}/monitor.started'; for _ in {{1..100}}; do sleep 0.1; done"
)


@pytest.fixture
def submit(lab, recipe, tmp_path, capsys):
    """Submits jobs of one process, with these lines in their profile; returns the number of the job."""

    def submit(*arguments: str, profile: str = "") -> str:
        (tmp_path / "program.sh").write_text(PROGRAM)
        path = tmp_path / "profile.yaml"
        path.write_text(f"gpus_per_node: 1\ncpus_per_gpu: 1\npython: [bash, {tmp_path}/program.sh]\n{profile}")
        assert main(["submit", str(recipe), "--profile", str(path), "--time", "5", *arguments]) == 0
        return capsys.readouterr().out.splitlines()[0].split()[-1].rstrip(".")

    return submit


def warn(number: str) -> None:
    """What Slurm does before the time limit: a signal to the script alone."""
    subprocess.run(["scancel", "--batch", "--signal=USR1", number], check=True)


def test_a_warning_reaches_the_training_where_setup_has_used_srun(submit, tmp_path):
    (tmp_path / "monitor.sh").write_text(MONITOR.format(tmp_path))
    step = "srun --overlap --ntasks=1"
    begun = f"until [[ -e {tmp_path}/monitor.started ]]; do sleep 0.1; done"  # or the training may be the step before
    number = submit(profile=f"setup: ['{step} true', '{step} bash {tmp_path}/monitor.sh &', '{begun}']\n")
    for name in ("0-0", "monitor"):
        wait_for(tmp_path / f"{name}.started")
    warn(number)
    wait_for(tmp_path / "0-0.stopped")
    assert (tmp_path / "0-0.stopped").read_text() == "training, step 2\n"
    wait_for(tmp_path / "0-1.started")  # requeued
    assert not (tmp_path / "monitor.stopped").exists()
    assert wait(number, *ENDED) == "COMPLETED"


@pytest.mark.slow
def test_a_run_of_an_array_puts_only_itself_back(submit, tmp_path):
    number = submit("--array", "train.seed=1,2")
    for name in ("0-0", "1-0"):
        wait_for(tmp_path / f"{name}.started")
    warn(f"{number}_1")  # whose own number is the array's
    wait_for(tmp_path / "1-1.started")
    (tmp_path / "end").touch()
    assert wait(number, *ENDED) == "COMPLETED"
    restarts = {job.array[1][0].start: job.restarts for job in slurm.jobs() if job.array and job.array[0] == number}
    assert restarts == {0: 0, 1: 1} and not (tmp_path / "0-0.stopped").exists()


def test_names_that_sbatch_would_cut_or_expand(submit, tmp_path):
    run = tmp_path / "a #1 run, 100%j 'x' \"y\""
    (tmp_path / "end").touch()
    number = submit(f"run.dir={json.dumps(str(run))}", profile="sbatch: ['--mail-user=a #b', --mail-type=NONE]\n")
    assert wait(number, *ENDED) == "COMPLETED"
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["rank_00000.out", f"slurm_{number}.out"]
    assert str(run) in (run / "logs" / f"slurm_{number}.out").read_text()
