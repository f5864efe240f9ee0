import json
import statistics
import time

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.training.tracking import Tracker
from tests.training.conftest import metrics


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


def test_a_log_call_takes_less_than_5_ms(recipe, tmp_path):
    config = load_config(recipe, [f"run.dir={tmp_path}", "tracking.wandb=offline"])
    tracker, seconds = Tracker(config, None), []
    heads = [[float(head) for head in range(16)] for _ in range(12)]
    for step in range(50):
        began = time.perf_counter()
        tracker.log({"step": step, "tokens": 512 * step, "loss": 2.0, "kept": heads, "lambda": heads})
        seconds.append(time.perf_counter() - began)
    tracker.finish()
    assert tracker.run is not None, "W&B must not have given up"
    assert statistics.median(seconds) < 5e-3


@pytest.mark.slow
def test_a_server_that_is_away_stops_nothing(recipe, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    began = time.monotonic()
    assert main(["train", str(recipe), "tracking.wandb=online"]) == 0
    assert time.monotonic() - began < 150
    assert metrics(tmp_path / "run") == metrics(reference)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
