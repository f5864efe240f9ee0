"""What a study's runs came to, by their files: states, second tries, the tuned rate, runs.csv and the table."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from megahybrid.cli import main
from megahybrid.data.lengths import sequence_lengths
from megahybrid.scaling.flops import flops_per_token
from megahybrid.study import status
from megahybrid.study.design import design
from megahybrid.study.outcomes import Survey, has_branch_point
from megahybrid.study.status import Overall
from megahybrid.training.metrics_file import lines_backwards
from tests.study.running import leave

NAN = math.nan
TWO_SIZES = "kinds: {one: '(G)*{layers}'}"
SEPARATE = ("kinds: {one: G}", "sizes: [{width: 32, layers: 1}]", "schedule: {kind: cosine, warmup_tokens: 640}")


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    monkeypatch.setattr("megahybrid.launch.runs.shutil.which", lambda name: None)


def outcomes(study) -> dict:
    return {each.cell.name: each for each in Survey(study).look(None)}


def trained(cell, until: float, *starts: dict) -> None:
    """Its starts, the last of which lasted to that time."""
    run = Path(cell.config.run.dir)
    (run / "attempts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"time": until}))


def collected() -> list[dict]:
    assert main(["study", "collect", "study.yaml"]) == 0
    with open("studies/small/runs.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("losses", "state", "how", "why"),
    [
        ((6.0, 5.0, 3.0), "done", "done", ""),
        ((6.0, 5.0, NAN), "done", "diverged", "its final loss is nan"),
        ((6.0, 5.0, 6.1), "done", "diverged", "its final loss, 6.1000, is above its first, 6.0000"),
        ((6.0, *[NAN] * 20), "failed", "diverged", "more than 20 steps in a row were left out"),
        ((NAN,) * 20, "failed", "diverged", "more than 20 steps in a row were left out"),
        ((*[NAN] * 19, 6.0, NAN), "failed", "failed", "odd"),
        ((6.0, 5.0), "stopped", "missing", "odd stopped it at step 2 of 189"),
        ((6.0, 5.0), "running", "failed", "it ended without a word"),
    ],
)
def test_how_a_run_has_ended(losses, state, how, why, make_study):
    study = make_study(*SEPARATE, "hold_out: null")
    (cell,) = [cell for cell in design(study) if cell.name == "one-32x1-4e9-s0"]
    leave(cell, state, losses, "" if state in ("done", "running") else "odd")
    found = outcomes(study)
    assert (found[cell.name].state, found[cell.name].why) == (how, why)
    assert found["one-32x1-2e9-s0"].state == "missing"
    # What has diverged is tried once more, as a run of its own.
    assert list(found)[3:] == (["one-32x1-4e9-s0-half"] if how == "diverged" else [])
    if how == "diverged":
        again = found["one-32x1-4e9-s0-half"].cell
        assert again.retry_of == cell.identity != again.identity == again.trunk == Path(again.config.run.dir).name
        assert again.config.optimizer.learning_rate == cell.config.optimizer.learning_rate / 2
        leave(again, losses=(6.0, NAN))
        assert len(outcomes(study)) == 4  # once


def test_a_run_of_a_job_that_is_silent_is_begun_again_where_no_queue_says_more(make_study):
    study = make_study(*SEPARATE, "hold_out: null")
    cell = design(study)[0]
    leave(cell, "running", (6.0, 5.0))
    status = Path(cell.config.run.dir, "status.json")
    for silent, state in ((30, "running"), (600, "missing")):
        status.write_text(json.dumps(json.loads(status.read_text()) | {"job": "7", "time": time.time() - silent}))
        assert outcomes(study)[cell.name].state == state
    assert re.fullmatch("no heartbeat for 10:..; the queue is not known", outcomes(study)[cell.name].why)


def test_what_begins_from_a_trunk_that_has_diverged_goes_over_to_its_second_try(make_study):
    study = make_study(TWO_SIZES, "hold_out: null")
    trunk, early, late = [cell for cell in design(study) if cell.size == "32x1"]
    assert (trunk.role, early.role, late.role) == ("trunk", "branch", "branch")
    leave(trunk, "failed", (*[6.0] * early.branch_step, *[NAN] * 20))  # past the milestone of one of the two
    found = outcomes(study)
    assert [found[cell.name].state for cell in (trunk, early, late)] == ["diverged", "missing", "diverged"]
    again = found[f"{trunk.name}-half"].cell, found[f"{late.name}-half"].cell
    assert again[1].config.train.branch_from == f"{again[0].config.run.dir}@{late.branch_step}"
    assert again[1].trunk == again[0].identity and again[1].retry_of == late.identity
    assert again[1].config.optimizer.learning_rate == again[0].config.optimizer.learning_rate
    assert f"{early.name}-half" not in found
    # One that diverges by itself is tried from scratch: its trunk has another rate.
    leave(trunk)
    leave(late, losses=(6.0, NAN))
    found = outcomes(study)
    half = found[f"{late.name}-half"]
    assert half.cell.trunk == half.cell.identity and f"{trunk.name}-half" not in found
    assert (half.cell.role, half.cell.branch_step, half.cell.config.train.branch_from) == ("single", None, None)
    assert (half.state, half.why, half.flops) == ("missing", "", late.flops)


def test_a_branch_of_a_trunk_that_has_passed_its_step_begins_earlier(make_study):
    """As when a budget is added afterwards: the same run in the same place, by a longer way."""
    study = make_study(TWO_SIZES, "hold_out: null")
    trunk, early, late = [cell for cell in design(study) if cell.size == "32x1"]
    leave(trunk)
    checkpoints = Path(trunk.config.run.dir, "checkpoints")
    for gone, start in ((late, early.branch_step), (early, None)):
        (checkpoints / f"step_{gone.branch_step:08d}" / "checkpoint.json").unlink()
        found = outcomes(study)[gone.name]
        assert (found.state, found.why) == (
            "missing",
            f"its trunk {trunk.name} has ended without step {gone.branch_step}",
        )
        cell, steps = found.cell, gone.config.train.steps
        point = start and f"{trunk.config.run.dir}@{start}"
        assert (cell.branch_step, cell.config.train.branch_from) == (start, point)
        assert (cell.identity, cell.trunk, cell.config.run.dir) == (gone.identity, trunk.identity, gone.config.run.dir)
        assert found.flops == pytest.approx(gone.flops * (1 - (start or 0) / steps)) and has_branch_point(cell)
    leave(outcomes(study)[early.name].cell, "stopped", (6.0, 6.0), "SIGTERM")
    found = outcomes(study)[early.name]
    assert found.flops_done == pytest.approx(found.cell.flops * 2 / early.config.train.steps)


def test_rates_are_those_of_the_grid_once_it_has_ended(make_study):
    rules = "rules: {learning_rate: fixed, batch: fixed, tune: {factors: [0.5, 1, 2]}}"
    study = make_study(*SEPARATE, rules, "hold_out: null")
    found = outcomes(study)
    grid = [each.cell for each in found.values() if each.cell.role == "tune"]
    waits = "waits for its learning rate to be tuned"
    assert {each.why for each in found.values() if each.cell.role != "tune"} == {waits}
    leave(grid[0], losses=(6.0, 2.0))
    leave(grid[1], losses=(6.0, 3.0))
    assert {each.why for each in outcomes(study).values() if each.cell.role != "tune"} == {waits}
    leave(grid[2], losses=(6.0, NAN))
    found = outcomes(study)
    rates = {each.cell.role: each.cell.config.optimizer.learning_rate for each in found.values()}
    assert rates["single"] == 0.5 * 0.005 and len(found) == 6  # the one that diverged has said what was asked
    same = grid[0].name.removesuffix("-x0.5")
    assert found[same].state == "done" and found[same].cell.identity == grid[0].identity
    rows = {row["cell"]: row for row in collected()}
    assert rows[grid[0].name]["excluded"] == "a run of the tuning grid" and rows[same]["excluded"] == ""


def test_runs_csv(make_study):
    study = make_study(TWO_SIZES)
    cells = {cell.name: cell for cell in design(study)}
    branch, trunk = cells["one-32x1-2e9-s0"], cells["one-32x1-8e9-s0"]
    leave(trunk, losses=(6.0, 3.25))
    leave(branch, losses=(5.0, 4.5))
    leave(cells["one-32x2-2e9-s0"], losses=(6.0, NAN))
    facts = {"job": None, "start": "", "step": 0, "nodes": "here", "gpus": "0", "last_word": None}
    job = facts | {"job": "7", "nodes": "there"}
    starts = [  # 400 s of one GPU; one whose processes never met; 100 s of two
        facts | {"processes": 1, "time": 1000.0},
        {"job": "7", "start": "", "step": None, "time": 1500.0},
        job | {"processes": 2, "time": 2000.0, "last_word": 1400.0},
    ]
    trained(trunk, 2100.0, *starts)
    trained(branch, 1600.0, facts | {"processes": 1, "time": 1200.0})  # which shared 200 s of the 400
    trained(cells["one-32x2-2e9-s0"], 1300.0, facts | {"gpus": "1", "processes": 1, "time": 1200.0})
    rows = {row["cell"]: row for row in collected()}
    assert list(rows) == [*cells, "one-32x2-2e9-s0-half"]
    row = rows[trunk.name]
    assert list(row)[:23] == [
        *("cell", "run", "kind", "size", "budget", "seed", "role", "trunk", "held_out", "retry_of", "parameters"),
        *("parameters_without_embedding", "tokens", "flops", "flops_per_token", "learning_rate", "batch_tokens"),
        *("steps", "gpu_hours", "loss", "state", "excluded", "code_version"),
    ]
    assert float(row["gpu_hours"]) == pytest.approx((200 + 200 / 2 + 2 * 100) / 3600, rel=1e-5)
    assert float(rows[branch.name]["gpu_hours"]) == pytest.approx((200 / 2 + 200) / 3600, rel=1e-5)
    assert (row["began"], rows["one-32x2-4e9-s0"]["began"]) == ("1970-01-01T00:16:40+00:00", "")
    assert float(rows["one-32x2-2e9-s0"]["gpu_hours"]) == pytest.approx(100 / 3600, rel=1e-5)
    told = ("run", "trunk", "held_out", "loss", "state", "excluded", "code_version", "batch_tokens", "learning_rate")
    assert [row[name] for name in told] == [trunk.identity] * 2 + [
        "0",
        "3.25",
        "done",
        "",
        "0.1.0 made up",
        "128",
        "0.005",
    ]
    parts = [float(value) for name, value in row.items() if name.startswith("flops: ")]
    tokens = trunk.config.train.steps * 128
    flops = flops_per_token(trunk.config, sequence_lengths(trunk.config))
    assert float(row["tokens"]) == tokens and float(row["flops"]) == pytest.approx(tokens * flops.training)
    assert sum(parts) == pytest.approx(float(row["flops"]), rel=1e-12) and min(parts) > 0
    assert rows[branch.name]["trunk"] == trunk.identity and float(rows[branch.name]["loss"]) == 4.5
    held_out = rows["one-32x2-8e9-s0"]
    assert held_out["held_out"] == "1" and held_out["excluded"].startswith("missing: waits for step ")
    nan, half = rows["one-32x2-2e9-s0"], rows["one-32x2-2e9-s0-half"]
    assert (nan["state"], nan["loss"], nan["excluded"]) == ("diverged", "", "diverged: its final loss is nan")
    assert half["retry_of"] == nan["run"] and half["state"] == "missing"
    before = Path("studies/small/runs.csv").read_bytes()
    assert collected() and Path("studies/small/runs.csv").read_bytes() == before


def test_what_was_collected_stays_when_its_directory_is_removed(make_study):
    study = make_study(TWO_SIZES, "hold_out: null")
    trunk, early, late, stays, *_ = design(study)
    leave(trunk, losses=(6.0, 3.0123456789012345))
    leave(stays)
    leave(early, losses=(6.0, 3.5))
    start = {"job": None, "start": "", "step": 0, "nodes": "here", "last_word": None, "processes": 1, "time": 1000.0}
    trained(trunk, 2800.0, start)
    trained(stays, 4600.0, start | {"time": 2800.0})
    rows, whole = collected(), Overall.of(Survey(study).look(None), None)
    for cell in (trunk, early):
        shutil.rmtree(cell.config.run.dir)
    found = outcomes(study)
    assert [found[cell.name].state for cell in (trunk, early, late)] == ["done", "done", "missing"]
    assert found[trunk.name].loss == 3.0123456789012345 and found[early.name].cell == early
    overall = Overall.of([*found.values()], None)
    assert (overall.states, overall.hours) == (whole.states, pytest.approx(1.0)) and overall.done == whole.done > 0
    # A branch that is not done begins from scratch, which is the same run, and says why.
    assert found[late.name].why == f"its trunk {trunk.name} has ended without step {late.branch_step}"
    assert found[late.name].cell.config.train.branch_from is None and found[late.name].cell.identity == late.identity
    rows[2]["excluded"] = f"missing: {found[late.name].why}"
    assert collected() == rows
    console = Console(width=120, record=True, quiet=False)
    status.show(study, print, console)
    told = console.export_text()
    assert re.search(rf"{trunk.name} +collected +3.0123", told) and f"{trunk.name}: " not in told
    assert "collected, directory gone: 2 of the runs that are done" in told
    # What has begun anew is no longer what was collected.
    leave(early, "stopped", (6.0,) * 5, "SIGTERM")
    assert outcomes(study)[early.name].state == "missing"


@pytest.mark.parametrize(
    ("wrong", "right", "says"),
    [
        (",done,", ",done", "has not as many columns as the first line has names; mend it. Remove the file where no"),
        (",3.0,", ",3.0x,", "has loss = '3.0x'; it must be a number"),
        (",3.0,", ",,", "has loss = ''; it must be a finite number above 0"),
        ("began", "begun", "has no column 'began'"),
        (",0.005,", ",0.006,", "has learning_rate = 0.006 for one-32x1-8e9-s0, whose directory is gone and which has"),
    ],
)
def test_a_table_that_is_not_what_was_collected_is_refused(wrong, right, says, make_study, capsys):
    trunk = design(make_study(TWO_SIZES, "hold_out: null"))[0]
    leave(trunk)
    assert collected()
    shutil.rmtree(trunk.config.run.dir)
    table = Path("studies/small/runs.csv")
    table.write_text(table.read_text().replace(wrong, right, 1))
    for verb in ("status", "collect", "launch"):
        assert main(["study", verb, "study.yaml"]) == 2
        said = capsys.readouterr().err
        assert says in said and len(said.splitlines()) == 1


def plan(cells, **changes) -> None:
    """plan.csv, as far as what is counted of models is read from it."""
    names = "run", "kind", "size", "parameters", "parameters_without_embedding", "flops_per_token"
    with open("studies/small/plan.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for cell in cells:
            values = {name: getattr(cell, "identity" if name == "run" else name) for name in names} | changes
            writer.writerow(values.values())


def test_models_are_as_they_were_planned_where_all_runs_are(make_study, monkeypatch):
    def cells_of(study):
        return [each.cell for each in Survey(study).look(None)]

    study = make_study(TWO_SIZES)
    cells = design(study)
    plan(cells)
    with monkeypatch.context() as patched:
        patched.setattr("megahybrid.study.models._count", lambda config: pytest.fail("they were counted"))
        assert cells_of(study) == cells
    # Where they are others, or the plan is none, they are counted.
    plan(cells, parameters="many")
    assert cells_of(study) == cells
    for some, changes in (cells[:-1], {}), (cells, {"run": "0" * 16}), (cells, {"flops_per_token": 1e6}):
        plan(some, **{"parameters": 7} | changes)
        assert cells_of(study) == cells
    plan(cells)
    other = make_study(TWO_SIZES, "overrides: {train.global_batch_size: 2, model.intermediate_size: 96}")
    assert cells_of(other) == design(other) and cells_of(other)[0].parameters != cells[0].parameters


def test_who_looks_does_not_wait_for_torch(make_study):
    plan(design(make_study(TWO_SIZES)))
    look = (
        "import sys; from megahybrid.cli import main; main(['study', sys.argv[1], 'study.yaml']); print(*sys.modules)"
    )
    for verb in ("collect", "status"):
        loaded = subprocess.run([sys.executable, "-c", look, verb], capture_output=True, text=True, check=True).stdout
        assert "megahybrid.study.outcomes" in loaded.split() and not {"torch", "megatron"} & set(loaded.split())


def test_the_table_says_how_far_all_of_it_is(make_study):
    study = make_study(TWO_SIZES, "hold_out: null", "limits: {gpu_hours: 12}")
    cells = design(study)
    trunk, branch = (cells[number] for number in (0, 1))
    leave(trunk)
    leave(branch, "stopped", tuple([6.0] * 10), "SIGTERM")
    console = Console(width=80, record=True, quiet=False)
    status.show(study, print, console)
    told = console.export_text().splitlines()
    row = next(line for line in told if line.split()[:1] == [branch.name])
    assert row.split()[1:] == ["missing", f"{branch.branch_step + 10}/{branch.config.train.steps}", "6.0000"]
    assert any(line.startswith(f"{branch.name}: SIGTERM stopped it") for line in told)
    total = " ".join(line.strip() for line in told[-2:])
    assert total.startswith("[")
    # All FLOPs are those of every run's own tokens: a branch is a trunk's with another end.
    own = [cell.flops * (1 - (cell.branch_step or 0) / cell.config.train.steps) for cell in cells]
    share = (own[0] + branch.flops * 10 / branch.config.train.steps) / sum(own)
    assert f"{share:.1%} of {sum(own):.3g} FLOPs, 0 of 12 GPU hours: 1 done, 5 missing" in total
    assert total.count("#") == int(20 * share)
    assert next(lines_backwards(Path(trunk.config.run.dir, "metrics.jsonl")))["step"] == trunk.config.train.steps
