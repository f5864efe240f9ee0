"""Experiments and their verdicts (tools/evidence)."""

import json
import math
import os
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from megahybrid.config import load_config
from megahybrid.errors import UserError
from tests.tools.scripts import loaded
from tools.experiment import Run, measure, read, verdict
from tools.experiment_checks import Check
from tools.experiment_table import load, merge

ROOT = Path(__file__).parents[2]
GONE = {"E2d": ("warm", "every8", "every2", "warm-every8", "warm-counter")}
"""Arms whose recipe keys are gone, which can only be reported."""
FILE = """
statement: a beats b.
recipe: recipes/recall.yaml
arms: {a: [model.lte.buffer_size=32], b: []}
seeds: [1, 2]
given: [{quantity: beyond@1, arm: b, at_most: 0.5}]
passes: [{quantity: beyond@1, arm: a, above: b, by: 0.2}]
"""


@pytest.fixture
def experiment(tmp_path):
    def written(text):
        (tmp_path / "E.yaml").write_text(text)
        return read(tmp_path / "E.yaml")

    return written


def rows(**values):
    """By arm, `beyond@1` of seeds 1, 2, …"""
    return [
        {"setting": "all", "arm": arm, "seed": seed, "rate": None, "beyond@1": value}
        for arm, seeds in values.items()
        for seed, value in enumerate(seeds, 1)
    ]


@pytest.mark.parametrize(
    "a, b, outcome",
    [
        ([0.9, 0.75], [0.5, 0.1], "PASS"),
        ([0.9, 0.65], [0.5, 0.1], "FAIL"),  # one pair of seeds is too near
        ([0.9, 0.9], [0.6, 0.1], "INCONCLUSIVE"),
        ([0.1, 0.1], [0.6, 0.1], "INCONCLUSIVE"),
        ([0.9, None], [0.5, 0.1], "MISSING"),
        ([0.9], [0.5, 0.1], "MISSING"),
        ([0.9, 0.9], [], "MISSING"),
        ([0.6], [0.5], "MISSING"),  # what is given is open
        ([0.6], [0.5, 0.1], "FAIL"),  # whatever the other seed comes to
        ([], [0.6], "INCONCLUSIVE"),
        ([0.9, 0.9, 0.1], [0.5, 0.1, 0.9], "PASS"),  # a third seed is none of the experiment's
    ],
)
def test_verdicts(experiment, a, b, outcome):
    assert verdict(experiment(FILE), "all", rows(a=a, b=b))[0] == outcome


def test_a_setting_without_runs_is_one_line(experiment, capsys):
    for program in loaded("evidence"):
        assert program._tell(experiment(FILE), []) == 1
    assert capsys.readouterr().out.endswith("\nall: MISSING, none of its runs\n")


def test_more_seeds_of_an_arm_are_asked_for(experiment):
    file = experiment(FILE + "more_seeds: {a: [7]}\n")
    outcome, told = verdict(file, "all", rows(a=[0.9, 0.9], b=[0.5, 0.1]))
    assert outcome == "MISSING"
    assert told[1].endswith("at least 0.2 above b: least 0.900, most of b 0.500, 2 of 3 seeds and 2 of 2 seeds")


def test_of_a_setting_without_checks_nothing_is_told(experiment, capsys):
    text = FILE.replace("0.5}", "0.5, settings: [s]}").replace("0.2}", "0.2, settings: [s]}")
    file = experiment(text + "settings: {s: [], t: []}\n")
    known = [{**row, "setting": setting} for setting in "st" for row in rows(a=[0.9, 0.9], b=[0.5, 0.5])]
    for program in loaded("evidence"):
        assert program._tell(file, known) == 0
    told = capsys.readouterr().out
    assert "\ns: PASS\n" in told and "\nt:" not in told


def test_runs_that_choose_a_rate_do_not_count(experiment):
    file = experiment(FILE + "rates: [0.001, 0.002, 0.004]\nchoose: beyond@1\n")
    came_to = [("a", 0.001, 0.3), ("a", 0.002, 0.8), ("a", 0.004, None), ("b", 0.001, 0.9)]
    tried = [{"setting": "all", "arm": arm, "seed": 0, "rate": rate, "beyond@1": value} for arm, rate, value in came_to]
    assert len(file.choosing(file.cells([]))) == 6
    runs = file.counting(file.cells([]), tried)
    expected = [("a", 1, 0.002), ("a", 2, 0.002), ("b", 1, 0.001), ("b", 2, 0.001)]
    assert [(run.arm, run.seed, run.rate) for run in runs] == expected
    assert file.counting(file.cells(["a"]), []) == []
    assert verdict(file, "all", [*rows(a=[0.9, 0.9], b=[0.5, 0.5]), *tried])[0] == "PASS"


@pytest.mark.parametrize(
    "bounds, own, others, holds, told",
    [
        ({"at_least": 0.5}, [0.5, 0.6], [], True, "at least 0.5: least 0.500, 2 of 2 seeds"),
        ({"at_least": 0.5}, [0.4, 0.9], [], False, "at least 0.5: least 0.400, 2 of 2 seeds"),
        ({"at_least": 0.5}, [0.6], [], None, "at least 0.5: least 0.600, 1 of 2 seeds"),
        ({"at_least": 0.5}, [0.4], [], False, "at least 0.5: least 0.400, 1 of 2 seeds"),
        ({"at_most": 0.5}, [0.4, 0.6], [], False, "at most 0.5: most 0.600, 2 of 2 seeds"),
        ({"at_most": 0.5}, [], [], None, "at most 0.5: 0 of 2 seeds"),
        ({"at_most": 0.5}, [0.4, math.nan], [], False, "at most 0.5: most"),
        ({"not_below": "b"}, [math.nan, 0.9], [0.5, 0.5], False, "not below b in the mean: means nan"),
        ({"above": "b"}, [0.7, 0.6], [0.5, 0.6], True, "not below b: least 0.600, most of b 0.600"),
        ({"below": "b", "by": 0.03}, [1.00, 1.02], [1.05, 1.06], True, "at least 0.03 below b: most 1.020, least of b"),
        ({"below": "b", "by": 0.03}, [1.00, 1.03], [1.05, 1.06], False, "at least 0.03 below b: most 1.030"),
        ({"below": "b", "by": -0.03}, [1.07], [1.05, 1.06], None, "at most 0.03 above b: most 1.070"),
        ({"below": "b"}, [1.07], [1.05], False, "not above b: most 1.070, least of b 1.050, 1 of 2 seeds and 1 of 2"),
        (
            {"not_below": "b", "by": 0.05},
            [0.2, 0.8],
            [0.5, 0.54],
            True,
            "at most 0.05 below b in the mean: means 0.500",
        ),
        ({"not_below": "b", "by": 0.01}, [0.2, 0.8], [0.5, 0.54], False, "at most 0.01 below b in the mean: means"),
        ({"not_below": "b", "by": -0.1}, [0.2, 0.8], [0.3, 0.5], True, "at least 0.1 above b in the mean: means 0.500"),
        ({"not_below": "b"}, [0.2], [0.5, 0.54], None, "not below b in the mean: means 0.200 and 0.520, 1 of 2 seeds"),
    ],
)
def test_checks(bounds, own, others, holds, told):
    check, known, seeds = Check("beyond@1", "a", **bounds), rows(a=own, b=others), {"a": [1, 2], "b": [1, 2]}
    assert check.holds(known, seeds) is holds
    answer = {True: "yes", False: "no", None: "missing"}[holds]
    assert check.told(known, seeds).startswith(f"{answer}: beyond@1 of a {told}")


def test_quantities_of_a_run(tmp_path):
    folder = tmp_path / "evaluations"
    others = [(512, "learned", 0.9), (512, "oracle", 0.4), (2048, "learned", None)]
    for step, share in ((9, 0.1), (10, 0.7)):  # by number, not by name
        entries = [
            {"length": length, "policy": policy, "accuracy": 0.2, "beyond": {"accuracy": value}}
            for length, policy, value in [(512, "learned", share), *others]
        ]
        (folder / f"step_{step}").mkdir(parents=True)
        (folder / f"step_{step}" / "results.json").write_text(json.dumps({"results": entries}))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "hits": [1, 2]}\n{"step": 2, "hits": [3, 4], "x": 0.5}\n{"step": 3, "z": null}\n'
    )
    asked = ["beyond@1", "all@1", "beyond@1:oracle", "beyond@4", "beyond@16", "metric:hits.1", "metric:x", "metric:y"]
    asked += ["metric:hits.1@2", "metric:hits.0@1", "metric:hits.1@3", "metric:x@2", "metric:z", "metric:z.0"]
    found = [measure(tmp_path, quantity, 512) for quantity in asked]
    assert found == [
        pytest.approx(0.8),
        pytest.approx(0.2),
        0.4,
        None,
        None,
        4,
        0.5,
        None,
        2,
        3,
        None,
        None,
        None,
        None,
    ]


def test_the_table_keeps_what_others_have_measured(experiment, tmp_path):
    file, table = experiment(FILE), tmp_path / "E.csv"
    known = {"setting": "all", "seed": 1, "rate": None, "steps": 7, "tokens": 70, "code_version": "1"}
    merge(table, file, [{**known, "arm": "a", "beyond@1": 0.5}])
    merge(table, file, [{**known, "arm": arm, "beyond@1": value} for arm, value in [("a", 0.75), ("b", None)]])
    assert load(table, file) == [{**known, "arm": arm, "beyond@1": value} for arm, value in [("a", 0.75), ("b", None)]]


@pytest.mark.parametrize(
    "change, fault",
    [
        (("arm: a,", "arm: c,"), "a check names 'c', which is none of the arms"),
        (("above: b,", "above: c,"), "a check names 'c'"),
        (("above: b, by", "at_most: 1, above: b, by"), "needs one of at_least, at_most, above, below and not_below"),
        (("beyond@1, arm: b", "accuracy, arm: b"), "a check is of 'accuracy'"),
        (("seeds: [1, 2]", "seeds: [0, 2]"), "choose_seed is 0, which is a seed of the results"),
        (("seeds: [1, 2]", "seeds: [1, 2]\nrates: [1, 2]"), "say by which quantity to choose"),
        (("seeds: [1, 2]", "seeds: [1, 2]\nsetings: {}"), "setings"),
        (("seeds: [1, 2]", ""), "seeds"),
    ],
)
def test_what_is_no_experiment_is_refused(experiment, change, fault):
    with pytest.raises(UserError, match=fault):
        experiment(FILE.replace(*change))


@pytest.mark.parametrize("path", sorted((ROOT / "docs/evidence").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_can_begin(path):
    file = read(path)
    for setting, arm in file.cells([]):
        gone = pytest.raises(UserError, match="keep_all") if arm in GONE.get(path.stem, ()) else nullcontext()
        with gone:
            load_config(ROOT / file.recipe, file.overrides(Run(setting, arm, file.seeds[0], None)))


def test_text_is_prepared_before_anything_trains(experiment, monkeypatch):
    """With what the setting changes; of tasks alone there is nothing to prepare."""
    began = []
    for program in loaded("evidence"):
        monkeypatch.setattr(
            program.subprocess, "run", lambda words, **_: began.append(words[3:]) or SimpleNamespace(returncode=1)
        )
        file = experiment(FILE.replace("recall.yaml", "recall/text.yaml") + "settings: {s: [data.path=nowhere]}\n")
        with pytest.raises(UserError, match="could not be prepared"):
            program.Work(file, Path("runs"), Path("E.csv")).do(file.cells([]), None, 1, None, False)
        program.Work(experiment(FILE), Path("runs"), Path("E.csv"))._prepare([])
    assert began == [["prepare", str(ROOT / "recipes/recall/text.yaml"), "data.path=nowhere"]]


def test_what_the_table_has_is_not_run_again(experiment, tmp_path, monkeypatch, capsys):
    """A row without all that is asked of its arm is run again; so are all, `again`."""
    file = experiment(FILE + "policies: {a: [oracle]}\n")
    known = {"setting": "all", "rate": None, "steps": 7, "tokens": 70, "code_version": "1", "beyond@1": 0.5}
    oracles = {("a", 1): 0.5, ("a", 2): None, ("b", 1): None}
    merge(
        tmp_path / "E.csv",
        file,
        [{**known, "arm": arm, "seed": seed, "beyond@1:oracle": value} for (arm, seed), value in oracles.items()],
    )
    begun = []
    for program in loaded("evidence"):
        work = program.Work(file, tmp_path / "runs", tmp_path / "E.csv")
        monkeypatch.setattr(work, "_one", lambda run, _: begun.append((run.arm, run.seed)) or "failed")
        work.do(file.cells([]), None, 1, None, again=False)
        assert begun == [("a", 2), ("b", 2)]
        assert f"2 of 4 runs are in {tmp_path / 'E.csv'}." in capsys.readouterr().out
        work.do(file.cells([]), None, 1, None, again=True)
        assert len(begun) == 6


def test_a_run_whose_keys_are_gone_does_not_stop_the_others(experiment, tmp_path, monkeypatch, capsys):
    file = experiment(FILE.replace("model.lte.buffer_size=32", "model.lte.nothing=32"))
    for program in loaded("evidence"):
        monkeypatch.setattr(program, "_ended", lambda *_: "failed")
        program.Work(file, tmp_path / "runs", tmp_path / "E.csv").do(file.cells([]), [1], 1, None, again=False)
    told = capsys.readouterr().out
    assert "all/a/seed=1: " in told and "nothing" in told and "all/b/seed=1: train failed" in told


def test_a_setting_whose_keys_are_gone_does_not_stop_the_others(experiment, tmp_path, monkeypatch, capsys):
    file = experiment(FILE + "settings: {s: [model.lte.nothing=32], t: []}\n")
    for program in loaded("evidence"):
        monkeypatch.setattr(program, "_ended", lambda *_: "failed")
        program.Work(file, tmp_path / "runs", tmp_path / "E.csv").do(file.cells(["b"]), [1], 1, None, again=False)
    told = capsys.readouterr().out
    assert "s/b/seed=1: " in told and "nothing" in told and "t/b/seed=1: train failed" in told


def test_runs_spread_over_the_gpus(experiment, monkeypatch):
    with ExitStack() as running:
        for program in loaded("evidence"):
            monkeypatch.setattr(program, "visible_gpus", lambda: ["4", "7"])
            work = program.Work(experiment(FILE), Path("runs"), Path("E.csv"))
            with work._surroundings() as environment:
                assert environment["CUDA_VISIBLE_DEVICES"] == "4"
                others = [running.enter_context(work._surroundings())["CUDA_VISIBLE_DEVICES"] for _ in range(3)]
                assert others == ["7", "4", "7"]
            with work._surroundings() as environment:
                assert environment["CUDA_VISIBLE_DEVICES"] == "4"


def test_at_the_deadline_a_command_is_told_to_stop(tmp_path):
    saves = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print('saved'))); "
        "print('on', flush=True); time.sleep(60)"
    )
    for program in loaded("evidence"):
        for code, seconds, told in (
            (saves, 2.0, "stopped, the time is up"),
            ("raise SystemExit(3)", 60.0, "failed"),
            ("", math.inf, ""),
        ):
            with open(tmp_path / "log", "w") as log:
                began = time.monotonic()
                assert program._ended([sys.executable, "-c", code], log, dict(os.environ), began + seconds) == told
            assert time.monotonic() - began < 30
            assert (tmp_path / "log").read_text() == ("on\nsaved\n" if code is saves else "")


@pytest.mark.slow
def test_from_training_to_the_verdict(experiment, tmp_path):
    """On a CPU, with hardly any steps: nothing is learnt, and what is given does not hold. Again, nothing is done."""
    brief = (
        "common: [train.steps=2, train.global_batch_size=2, train.micro_batch_size=2, evaluate.every=0]\n"
        "samples: 1\nask: [--task, recall]\n"
    )
    file = experiment(FILE.replace("at_most: 0.5", "at_least: 0.5") + brief + "policies: {a: [oracle]}\n")
    command = [sys.executable, ROOT / "tools/evidence", "E", "--folder", tmp_path, "--runs", tmp_path / "runs"]
    for more, seconds in ((["--jobs", "2"], 600), ([], 60), (["--report"], 60)):
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, timeout=seconds)
        assert done.returncode == 1 and "all: INCONCLUSIVE" in done.stdout, done.stdout + done.stderr
        if "--report" in more:
            assert not (tmp_path / "E.png").exists()
        else:
            assert (tmp_path / "E.png").stat().st_size > 5000
            (tmp_path / "E.png").unlink()
    table = load(tmp_path / "E.csv", file)
    assert [(row["arm"], row["seed"]) for row in table] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert all((row["beyond@1:oracle"] is not None) == (row["arm"] == "a") for row in table)
