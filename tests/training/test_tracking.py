import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy
import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.training import tracking
from megahybrid.training.engine import Engine
from megahybrid.training.tracking import Tracker, histogram
from tests.training.conftest import metrics
from tests.training.wandb_server import WandbServer


def tracking_id(run, step):
    return json.loads((run / "checkpoints" / f"step_{step:08d}" / "checkpoint.json").read_text())["position"][
        "tracking_id"
    ]


def test_an_offline_run_keeps_its_id_over_a_resume(recipe, tmp_path):
    command = ["train", str(recipe), "tracking.wandb=offline"]
    assert main([*command, "train.steps=2"]) == 0
    assert main([*command, "train.steps=3"]) == 0
    run = tmp_path / "run"
    first, second = tracking_id(run, 2), tracking_id(run, 3)
    assert first is not None and first == second
    parts = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert parts and all(part.endswith(first) for part in parts)


def steps_in_files(run) -> list[int]:
    """The steps of all offline files of a run, read back with W&B's own tool."""
    steps = []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        items = [json.loads(line)["history"]["item"] for line in said.splitlines() if '"type":"history"' in line]
        assert all(item["tokens"] == 512 * item["step"] == 512 * item["_step"] for item in items)
        steps += [item["step"] for item in items]
    return steps


@pytest.mark.parametrize("lost", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_step_is_logged_once_over_a_failure(lost, recipe, tmp_path, monkeypatch):
    """Interrupted in step 8, three after a checkpoint; `lost`: what was logged until then never reached the disk."""
    command, run, real = (
        ["train", str(recipe), "tracking.wandb=offline", "train.steps=12", "train.log_every=5"],
        tmp_path / "run",
        Engine.step,
    )

    def interrupted(self, batches, step, *flags, **others):
        if step == 8:
            raise RuntimeError("the machine went away")
        return real(self, batches, step, *flags, **others)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(RuntimeError, match="went away"):
        main(command)
    assert steps_in_files(run) == list(range(1, 8))
    if lost:
        for folder in (run / "wandb").glob("offline-run-*"):
            shutil.rmtree(folder)
    monkeypatch.setattr(Engine, "step", real)
    assert main(command) == 0
    assert steps_in_files(run) == list(range(1, 13))


def test_of_very_many_steps_an_even_part_is_sent(recipe, tmp_path, monkeypatch):
    """As after a rollback, where a new run gets all that were before it: a start must not take hours."""
    monkeypatch.setattr(tracking, "_MOST_AT_ONCE", 10)
    run = SimpleNamespace(id="anew", settings=SimpleNamespace(_offline=True))
    monkeypatch.setattr(tracking, "_start", lambda *arguments: run)
    lines = [{"step": step} | ({"validation_loss": 2.0} if step == 41 else {}) for step in range(1, 61)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = load_config(recipe, [f"run.dir={tmp_path}", "tracking.wandb=offline", "train.log_every=4"])
    for sent, step in (([*range(8, 41, 8), 41, 48, 56], 59), (list(range(1, 11)), 10)):
        steps = []
        monkeypatch.setattr(Tracker, "log", lambda self, line, steps=steps: steps.append(line["step"]))
        Tracker(config, None, step)
        assert steps == sent


def test_layers_have_the_numbers_that_pictures_give_them(recipe):
    regulated = tracking.regulated(load_config(recipe)) | {"loud": ("voice", [2])}  # the pattern is GLSFL
    flat = tracking._flat({"kept": [[1.0, 2.0], [3.0, 5.0]], "loud": [[7.0]]}, regulated)
    means = {key: value for key, value in flat.items() if isinstance(value, float)}
    assert means == {"kept/layer_1": 1.5, "kept/layer_4": 4.0, "loud/layer_2": 7.0}
    assert flat.keys() - means.keys() == {"kept_heads/layer_1", "kept_heads/layer_4", "loud_voices/layer_2"}


@pytest.mark.parametrize("values", [[random.Random(n).gauss(0, 9) for n in range(48)], [2.0] * 3, [0.0, 1e-30, 1.0]])
def test_histograms_are_those_of_numpy(values):
    counts, edges = histogram(values)
    expected, expected_edges = numpy.histogram(values, 32)
    assert counts == expected.tolist()
    numpy.testing.assert_allclose(edges, expected_edges, rtol=1e-12, atol=1e-12)


def test_a_log_call_takes_less_than_5_ms(recipe, tmp_path):
    config = load_config(recipe, [f"run.dir={tmp_path}", "tracking.wandb=offline", "model.pattern=(GL)*12"])
    tracker, seconds = Tracker(config, None), []
    heads = [[float(head) for head in range(16)] for _ in range(12)]
    for step in range(50):
        began = time.perf_counter()
        tracker.log({"step": step, "tokens": 512 * step, "loss": 2.0, "kept": heads, "lambda": heads})
        seconds.append(time.perf_counter() - began)
    tracker.finish()
    assert tracker.run is not None, "W&B must not have given up"
    assert statistics.median(seconds) < 5e-3


def test_a_step_is_sent_while_the_next_one_is_computed(recipe, tmp_path, monkeypatch):
    happened, step, log = [], Engine.step, Tracker.log

    def stepping(self, batches, number, *others):
        happened.append(f"step {number}")
        result = step(self, batches, number, *others)
        happened.append(f"stepped {number}")
        return result

    monkeypatch.setattr(Engine, "step", stepping)
    monkeypatch.setattr(Tracker, "log", lambda self, line: happened.append(f"log {line['step']}") or log(self, line))
    assert main(["train", str(recipe), "tracking.wandb=offline", "train.steps=3"]) == 0
    assert happened == ["step 1", "stepped 1", "step 2", "log 1", "stepped 2", "step 3", "log 2", "stepped 3", "log 3"]
    assert steps_in_files(tmp_path / "run") == [1, 2, 3]


@pytest.fixture
def server(monkeypatch):
    import wandb

    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()  # it reads the environment once a process
        yield server
    wandb.teardown()


@pytest.mark.slow
def test_a_server_gets_every_step_once_over_a_failure(server, recipe, tmp_path, monkeypatch):
    command, real = ["train", str(recipe), "tracking.wandb=online", "train.steps=12"], Engine.step

    def interrupted(self, batches, step, *flags, **others):
        if step == 8:
            raise RuntimeError("the machine went away")
        return real(self, batches, step, *flags, **others)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(RuntimeError, match="went away"):
        main(command)
    assert [line["step"] for line in server.history] == list(range(1, 8))
    monkeypatch.setattr(Engine, "step", real)
    assert main(command) == 0
    assert [line["step"] for line in server.history] == list(range(1, 13))
    assert all(line["tokens"] == 512 * line["_step"] for line in server.history)


@pytest.mark.slow
def test_offline_files_of_one_run_are_synced_by_one_command(server, recipe, tmp_path):
    command = ["train", str(recipe), "tracking.wandb=offline"]
    assert main([*command, "train.steps=6"]) == 0
    assert main([*command, "train.steps=9"]) == 0
    files = sorted(map(str, (tmp_path / "run" / "wandb").glob("offline-run-*")))
    assert len(files) == 2
    # In a folder of its own: the command leaves its log where it runs.
    subprocess.run([sys.executable, "-m", "wandb", "sync", *files], check=True, timeout=120, cwd=tmp_path)
    assert [line["step"] for line in server.history] == list(range(1, 10))


@pytest.mark.slow
def test_a_server_that_goes_away_mid_run_stops_nothing(server, recipe, reference, tmp_path, monkeypatch):
    real = Engine.step

    def until_then(self, batches, step, *flags, **others):
        if step == 8:
            server.go_away()
        return real(self, batches, step, *flags, **others)

    monkeypatch.setattr(Engine, "step", until_then)
    began = time.monotonic()
    assert main(["train", str(recipe), "tracking.wandb=online"]) == 0
    assert time.monotonic() - began < 150
    assert metrics(tmp_path / "run") == metrics(reference)


@pytest.mark.slow
def test_a_server_that_is_away_stops_nothing(recipe, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    began = time.monotonic()
    assert main(["train", str(recipe), "tracking.wandb=online"]) == 0
    assert time.monotonic() - began < 150
    assert metrics(tmp_path / "run") == metrics(reference)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
