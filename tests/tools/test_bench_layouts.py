import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import prepared, recipe, text  # noqa: F401

TOOL = Path(__file__).parents[2] / "tools" / "bench_layouts"


def bench(file: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, str(TOOL), str(file), "--steps", "3", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_line_for_each_layout_with_losses_beside_the_first(recipe, tmp_path):  # noqa: F811
    out = tmp_path / "layouts.jsonl"
    lines = bench(recipe, "--layout", "", "--layout", "tensor=2,sequence=true", "--out", str(out))
    assert lines == [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["processes"] for line in lines] == [1, 2]
    assert lines[1]["loss_difference"] < 2e-6 and lines[1]["tokens_per_second"] > 0


@pytest.mark.slow
def test_what_fails_says_why_and_what_takes_too_long_leaves_no_process(recipe, tmp_path):  # noqa: F811
    missing = tmp_path / "missing"
    [line] = bench(recipe, f"data.path={missing}")
    assert str(missing) in line["error"]
    [line] = bench(recipe, "--layout", "tensor=2", "--timeout", "2")
    assert line["error"] == "not done after 2 s"
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert str(recipe).encode() not in process.read_bytes()
