"""Launching a study here: each run once, in an order that works, whatever ends on the way."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import types
from collections import Counter
from pathlib import Path

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config, save_config
from megahybrid.devices import gpu_memory, visible_gpus
from megahybrid.files import read_json
from megahybrid.scaling.memory import peak_bytes
from megahybrid.study import launch as launching
from megahybrid.study import prediction
from megahybrid.study.design import design
from megahybrid.study.expected import expect
from megahybrid.study.file import load_study
from megahybrid.study.identity import find_data
from megahybrid.study.local import Processes
from megahybrid.study.outcomes import Survey
from tests.study.running import calls, launch, leave

ONE_TRUNK = ("kinds: {one: '(G)*{layers}'}", "sizes: [{width: 32, layers: 1}]", "hold_out: null")

pytestmark = pytest.mark.usefixtures("small")


def test_runs_side_by_side(make_study, trainer, fit, capsys):
    cells = {cell.name: cell for cell in design(make_study())}
    trainer(0.01)
    assert launch("--jobs", "3") == 0
    noted = calls()
    begun = [each["name"] for each in noted if each["what"] == "begins"]
    assert sorted(begun) == sorted(cells)  # each once
    said = capsys.readouterr().out
    at_once = [0]
    for line in said.splitlines():
        at_once.append(at_once[-1] + (" begins (" in line) - (" is done" in line))
    assert max(at_once) == 3 and at_once[-1] == 0 and "100.0%" in said
    # The longest of those that can begin are first, and those that are held out come last, after what was predicted.
    order = [line.split()[0] for line in said.splitlines() if " begins (" in line]
    assert order[:2] == ["one-32x1-8e9-s0", "two-32x1-8e9-s0"] and {cells[name].role for name in order[:3]} == {"trunk"}
    assert order[-2:] == ["one-32x2-8e9-s0", "two-32x2-8e9-s0"]
    assert {each["name"] for each in noted if each["frozen"]} == set(order[-2:])
    held = json.loads(Path("studies/small/prediction.json").read_text())
    assert {made["cell"]: identity for identity, made in held.items()} == {
        name: cells[name].identity for name in order[-2:]
    }
    table = Path(
        "studies/small/predicted-from-" + (made := held[cells[order[-1]].identity])["table_sha256"][:16] + ".csv"
    )
    assert made["loss"] == 2.5 and made["table"] == table.name
    assert hashlib.sha256(table.read_bytes()).hexdigest() == made["table_sha256"]
    # Launched again nothing begins, and what is frozen stays.
    os.utime("studies/small/prediction.json", (1, 1))
    assert launch("--jobs", "3") == 0 and calls() == noted
    assert Path("studies/small/prediction.json").stat().st_mtime == 1
    # Nor is it made anew where it cannot be read now.
    Path("studies/small/prediction.json").write_text("{")
    shutil.rmtree(Path("studies/runs", cells[order[-1]].identity))
    assert launch() == 2 and "what was predicted is not predicted anew" in capsys.readouterr().err and calls() == noted


def test_a_prediction_is_of_one_very_run_and_never_of_one_that_has_begun(make_study, trainer, fit, capsys):
    def survey(rate):
        overrides = f"overrides: {{train.global_batch_size: 2, optimizer.learning_rate: {rate}}}"
        study = make_study("kinds: {one: '(G)*{layers}'}", overrides)
        for cell in design(study):
            if not cell.held_out:
                leave(cell)
        return Survey(study).look(None)

    folder, file, held = Path("studies/small"), Path("studies/small/prediction.json"), []
    for rate in (0.004, 0.005):
        outcomes = survey(rate)
        held += [each.cell for each in outcomes if each.cell.held_out]
        assert not prediction.is_frozen(folder, outcomes)
        before = read_json(file) or {}
        prediction.freeze(load_study("study.yaml"), outcomes)
        assert prediction.is_frozen(folder, outcomes) and read_json(file).items() >= before.items()
    assert list(read_json(file)) == [cell.identity for cell in held] and held[0].name == held[1].name
    # Another study has trained it, or prediction.json is gone: what is known already is no forecast.
    leave(held[1])
    file.unlink()
    outcomes = survey(0.005)
    assert prediction.is_frozen(folder, outcomes) and prediction.too_late(folder, outcomes) == [held[1].name]
    trainer()
    assert launch() == 0 and not calls() and not file.exists()
    assert f"Nothing is predicted of {held[1].name}: begun before" in capsys.readouterr().out


def test_a_branch_begins_while_its_trunk_goes_on(make_study, trainer):
    make_study(*ONE_TRUNK)
    trainer(0.01, one_32x1_8e9_s0="waits")  # for a second run to begin
    assert launch("--jobs", "2") == 0
    assert [each["what"] for each in calls()][:2] == ["begins", "begins"]


def test_a_run_that_fails_stops_no_other_and_is_tried_by_the_next_launch(make_study, trainer, fit, capsys):
    make_study("kinds: {one: '(G)*{layers}'}")
    trainer(0.01, one_32x1_2e9_s0="fails", one_32x1_4e9_s0="dies")
    assert launch("--jobs", "4") == 1
    said = capsys.readouterr().out
    assert "one-32x1-2e9-s0 has failed: ValueError: odd; see" in said and "What is held out waits" in said
    assert "one-32x1-4e9-s0 has failed: it ended before training began (exit status -9); see" in said
    ends = Counter(each["what"] for each in calls())
    assert ends == {"begins": 5, "ends": 3}
    trainer(0.01)
    assert launch("--jobs", "4") == 0
    again = [each["name"] for each in calls()[8:] if each["what"] == "begins"]
    assert again[2:] == ["one-32x2-8e9-s0"] and set(again[:2]) == {"one-32x1-2e9-s0", "one-32x1-4e9-s0"}


def test_a_study_that_no_launch_can_bring_further_ends_with_1_and_says_what_to_change(make_study, trainer, capsys):
    """No law fits so few runs, for which what is held out waits."""
    make_study("kinds: {one: '(G)*{layers}'}")
    trainer(0.01)
    for _ in range(2):
        assert launch("--jobs", "4") == 1
        said = capsys.readouterr().out
        assert "What is held out waits: one has 5 runs to fit" in said
        assert "mend 'study.yaml' (more sizes or budgets)" in said and "The same command goes on" not in said
    assert sum(each["what"] == "begins" for each in calls()) == 5


def test_a_run_whose_loss_no_law_gives_is_what_has_to_be_mended(make_study, trainer, fit, capsys):
    """Not the law, and not the table, which is made from the runs."""
    cells = {cell.name: cell for cell in design(make_study("kinds: {one: '(G)*{layers}'}"))}
    run = Path(cells["one-32x1-4e9-s0"].config.run.dir)
    trainer(0.01, one_32x1_4e9_s0="vanishes")
    for _ in range(2):
        assert launch("--jobs", "4") == 1
        said = capsys.readouterr().out
        assert "What is held out waits: one-32x1-4e9-s0 has ended with loss 0.0" in said
        assert f"correct it in '{run / 'metrics.jsonl'}', or remove the run's directory" in said
        assert "Once that is mended, the same command goes on." in said
        assert "more sizes" not in said and "goes on with what waits" not in said
    shutil.rmtree(run)
    trainer(0.01)
    assert launch("--jobs", "4") == 0
    assert [each["name"] for each in calls() if each["what"] == "begins"][5:] == ["one-32x1-4e9-s0", "one-32x2-8e9-s0"]


def test_what_has_failed_for_good_is_given_up_and_named(make_study, trainer, fit, capsys):
    one = "kinds: {one: '(G)*{layers}'}"
    for cell in design(make_study(one)):
        if cell.name == "one-32x1-8e9-s0":
            leave(cell, "failed", reason="ValueError: odd")
        elif cell.size == "32x2" and not cell.held_out:
            leave(cell)
    make_study(one, "give_up: [one-32x1-8e9-s0]")
    trainer(0.01)
    assert launch("--jobs", "2") == 0
    begun = [each["name"] for each in calls() if each["what"] == "begins"]
    # Its branches are trained without it, and what is held out is predicted.
    assert sorted(begun[:2]) == ["one-32x1-2e9-s0", "one-32x1-4e9-s0"] and begun[2:] == ["one-32x2-8e9-s0"]
    (made,) = read_json(Path("studies/small/prediction.json")).values()
    assert made["without"] == ["one-32x1-8e9-s0"]
    assert ",failed,failed: given up: ValueError: odd," in Path("studies/small/runs.csv").read_text()
    assert "has failed" not in capsys.readouterr().out
    make_study(one, "give_up: [one-32x1-7e9-s0]")
    assert launch() == 2 and "give_up has one-32x1-7e9-s0, which is no cell" in capsys.readouterr().err


def test_what_was_collected_is_not_trained_again_when_its_directory_is_gone(make_study, trainer, fit, capsys):
    """As on another machine: what is held out is what begins, of what was predicted there."""
    cells, folder = design(make_study("kinds: {one: '(G)*{layers}'}")), Path("studies/small")
    for cell in cells:
        if not cell.held_out:
            leave(cell)
    (held,) = [cell for cell in cells if cell.held_out]
    trainer(0.01)
    assert main(["study", "collect", "study.yaml"]) == 0
    table = (folder / "runs.csv").read_bytes()
    shutil.rmtree("studies/runs")
    assert launch("--jobs", "3") == 0
    assert [(each["what"], each["name"]) for each in calls()] == [("begins", held.name), ("ends", held.name)]
    (made,) = read_json(folder / "prediction.json").values()
    assert made["without"] == []
    before, after = ((path.read_text().splitlines()) for path in (folder / made["table"], folder / "runs.csv"))
    assert before[:-1] == table.decode().splitlines()[:-1] == after[:-1]
    # Again on another machine: what was predicted stays, byte for byte.
    frozen = (folder / "prediction.json").read_bytes()
    shutil.rmtree("studies/runs")
    assert launch("--jobs", "3") == 0 and len(calls()) == 4
    assert (folder / "prediction.json").read_bytes() == frozen
    # Of a run whose loss was collected nothing is predicted any more.
    assert main(["study", "collect", "study.yaml"]) == 0
    shutil.rmtree("studies/runs")
    (folder / "prediction.json").unlink()
    capsys.readouterr()
    assert launch() == 0 and len(calls()) == 4 and not (folder / "prediction.json").exists()
    assert f"Nothing is predicted of {held.name}" in capsys.readouterr().out


def test_an_interrupted_launch_has_its_runs_save_and_goes_on(make_study, trainer, fit, monkeypatch, capsys):
    make_study(*ONE_TRUNK)
    trainer(seconds=30)
    real = Processes.wait

    def interrupted(self, seconds):
        if len(calls()) == 2:  # both have begun
            raise KeyboardInterrupt
        return real(self, seconds)

    monkeypatch.setattr(Processes, "wait", interrupted)
    assert launch("--jobs", "2") == 130
    assert Counter(each["what"] for each in calls()) == {"begins": 2, "stopped": 2}
    monkeypatch.setattr(Processes, "wait", real)
    trainer(0.01)
    assert launch("--jobs", "2") == 0
    assert Counter(each["what"] for each in calls()) == {"begins": 5, "stopped": 2, "ends": 3}


def test_a_diverged_run_is_tried_once_at_half_the_rate(make_study, trainer, fit):
    study = make_study(*ONE_TRUNK)
    trainer(0.01, one_32x1_2e9_s0="diverges")
    assert launch("--jobs", "2") == 0
    assert [each["name"] for each in calls() if each["what"] == "begins"][3:] == ["one-32x1-2e9-s0-half"]
    rows = Path("studies/small/runs.csv")
    assert main(["study", "collect", "study.yaml"]) == 0
    assert [line.split(",")[0] for line in rows.read_text().splitlines()[1:]] == [
        *(cell.name for cell in design(study)),
        "one-32x1-2e9-s0-half",
    ]


def test_two_launches_at_once_are_refused(make_study, trainer, capsys):
    make_study()
    trainer()
    with open("studies/small/launch.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert launch() == 2
    assert "is being launched already" in capsys.readouterr().err and not calls()


def test_what_is_not_planned_as_it_is_is_refused(make_study, trainer, capsys):
    make_study()
    trainer()
    with open("study.yaml", "a") as file:
        file.write("\nrepeats: {seeds: 2}")
    assert launch() == 2
    assert "run `megahybrid study plan study.yaml` first" in capsys.readouterr().err and not calls()


def test_a_plan_of_other_data_is_refused(make_study, trainer, capsys):
    cells = design(make_study(*ONE_TRUNK))
    trainer(0.01)
    plan = Path("studies/small/plan.csv")
    for data in ("", "abc"):  # planned before they were prepared, and of others
        plan.write_text(f"cell,gpu_hours,data\none,1,{data}\n")
        assert launch() == 2
        assert "The data are others than when 'study.yaml' was planned" in capsys.readouterr().err and not calls()
    plan.write_text(f"cell,gpu_hours,data\none,1,{find_data(cells[0].config)}\n")
    assert launch() == 0 and calls()


def test_what_does_not_fit_into_the_gpu_side_by_side_is_refused(make_study, trainer, capsys, monkeypatch):
    cells = design(make_study(*ONE_TRUNK))
    trainer(0.01)
    largest = max(peak_bytes(cell.config, 1)[0] for cell in cells) + 2**29
    monkeypatch.setattr(launching, "gpu_memory", lambda: 2.01 * largest)
    monkeypatch.setattr(launching, "expect", lambda *_: pytest.fail("it is refused before what takes longer"))
    assert launch("--jobs", "3") == 2 and not calls()
    assert (
        "The 3 largest runs take 1.5 GiB side by side, and a GPU here has 1.0; give --jobs 2" in capsys.readouterr().err
    )
    # Of two GPUs each has two of four.
    monkeypatch.setattr(launching, "visible_gpus", lambda: ["0", "1"])
    assert launch("--jobs", "5") == 2 and "give --jobs 4" in capsys.readouterr().err and not calls()
    monkeypatch.setattr(launching, "expect", lambda *_: None)
    assert launch("--jobs", "4") == 0


def test_runs_are_spread_over_the_gpus(make_study, trainer, monkeypatch, tmp_path):
    """Two of them, one of which has a run that another launch has left."""
    monkeypatch.setattr("megahybrid.study.local.visible_gpus", lambda: ["3", "GPU-b"])
    cells = design(make_study("hold_out: null"))
    trainer(0.6)
    with Processes(Path("studies/small"), 4) as processes:
        left = tmp_path / "left"
        left.mkdir()
        (left / "attempts.jsonl").write_text('{"gpus": "3"}\n')
        for cell in [cell for cell in cells if cell.role == "trunk"][:3]:
            processes.start(cell.config, "study.yaml", {left} | processes.running)
        while processes.running:
            processes.wait(1)
        processes.start(cells[1].config, "study.yaml", {left})  # those that have ended count no more
        processes.wait(10)
    begun = [each["gpu"] for each in calls() if each["what"] == "begins"]
    assert (Counter(begun[:3]), begun[3]) == ({"GPU-b": 2, "3": 1}, "GPU-b")


def test_gpus_are_named_as_they_are_visible(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for named, found in ((None, ["0", "1"]), ("5,GPU-b", ["5", "GPU-b"]), ("7,6,-1,3", ["7", "6"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named) if named else monkeypatch.delenv(
            "CUDA_VISIBLE_DEVICES", False
        )
        assert visible_gpus() == found


def test_the_smallest_gpu_decides_what_fits(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda gpu: types.SimpleNamespace(total_memory=(80, 24)[gpu])
    )
    assert gpu_memory() == 24
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert gpu_memory() == math.inf


def test_what_another_study_wants_of_a_run_stays(make_study, trainer):
    trunk = design(make_study(*ONE_TRUNK, "budgets: {flops: [1.0e9, 8.0e9]}"))[0]
    leave(trunk, "stopped", tuple([6.0] * 10), "SIGTERM")
    save_config(trunk.config, Path(trunk.config.run.dir, "config.yaml"))
    ours = design(make_study(*ONE_TRUNK))[0]
    trainer(0.01)
    assert ours.identity == trunk.identity and launch("--jobs", "2") == 0
    (given,) = Path(trunk.config.run.dir).glob("submit/*/config.yaml")
    theirs = set(trunk.config.checkpoint.milestones)
    assert theirs and set(load_config(given).checkpoint.milestones) == theirs | set(ours.config.checkpoint.milestones)


def test_what_cannot_tell_the_laws_terms_apart_is_refused(make_study, trainer, capsys, monkeypatch):
    """Also where the base recipe has changed since it was planned."""
    make_study(*ONE_TRUNK)
    trainer()
    monkeypatch.setattr(launching, "expect", expect)
    assert launch() == 2
    assert "all its runs have one size, which says nothing of others" in capsys.readouterr().err and not calls()


def test_gpu_hours_are_limited(make_study, trainer, capsys, monkeypatch):
    cells = design(make_study(*ONE_TRUNK, "limits: {gpu_hours: 1}"))
    trainer(0.01)
    monkeypatch.setattr(launching, "tabled_estimate", lambda config: types.SimpleNamespace(hours=0.4))
    assert launch() == 2
    assert "has taken 0 GPU hours and its runs would take 1.2 more" in capsys.readouterr().err and not calls()
    leave(cells[0])
    run = Path(cells[0].config.run.dir)
    attempt = {"nodes": "here", "job": None, "start": "a", "processes": 1, "step": 0, "last_word": None, "time": 0}
    (run / "attempts.jsonl").write_text(json.dumps(attempt) + "\n")
    (run / "status.json").write_text(json.dumps(read_json(run / "status.json") | {"time": 0.3 * 3600}))
    assert launch() == 2
    assert "has taken 0.3 GPU hours and its runs would take 0.8 more" in capsys.readouterr().err
    leave(cells[1], "stopped", (6.0,) * 10, "SIGTERM")  # of which the rest alone is still to come
    rest = 0.4 * (1 - 10 / (cells[1].config.train.steps - cells[1].branch_step)) + 0.4
    make_study(*ONE_TRUNK, f"limits: {{gpu_hours: {0.299 + rest}}}")
    assert launch() == 2
    assert f"and its runs would take {rest:.3g} more" in capsys.readouterr().err
    make_study(*ONE_TRUNK, f"limits: {{gpu_hours: {0.301 + rest}}}")
    assert launch() == 0 and len(calls()) == 4
