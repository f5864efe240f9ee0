import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_layouts_train_on_the_same_tokens_one_after_the_other_in_the_same_processes():
    command = [
        sys.executable,
        ROOT / "tools" / "bench_model",
        "recipes/quickstart.yaml",
        "--samples",
        "4",
        "--steps",
        "1",
    ]
    for layout in ("", "data=2,zero_stage=3", "tensor=2,sequence=true,train.micro_batch_size=2", "pipeline=2"):
        command += ["--layout", layout]
    command += ["train.seq_length=64", "train.micro_batch_size=1", "model.pattern=GL"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["processes"] for line in lines] == [1, 2, 2, 2]
    for line in lines:
        assert len(line["losses"]) == 3 and line["tokens_per_second"] > 0
        assert line["loss_difference"] < 2e-6


def test_a_kept_share_goes_with_no_pipeline():
    command = [sys.executable, ROOT / "tools" / "bench_model", "recipes/quickstart.yaml", "--kept", "0.125"]
    command += ["--layout", "", "--layout", "pipeline=2", "model.pattern=GL"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    assert "--kept goes with no pipeline, whose stages see no whole pass: leave out one of the two." in done.stderr
