import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["GLSFN"])
def test_all_letters_are_measured_at_toy_sizes(pattern):
    command = [sys.executable, ROOT / "tools" / "bench_generate", "gdn-0.4b", "--tiny", f"model.pattern={pattern}"]
    command += ["--context", "40", "--batch", "2", "--long", "100", "--limit", "0.2", "--no-kernels", "--export"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, last = map(json.loads, done.stdout.splitlines())
    eager = [line for line in lines if line.get("mode") != "graph"]
    assert [(line["op"], line["context"], line["batch"]) for line in eager] == [
        ("prefill", 40, 2),
        ("decode", 40, 2),
        ("decode", 100, 1),
        ("export_prefill", 40, 2),
        ("export_decode", 40, 2),
    ]
    assert all(line["tokens_per_second"] > 0 and "error" not in line for line in lines)
    assert all(line["same_tokens"] for line in lines if line.get("mode") == "graph")
    assert all(("by_engine" in line) == line["op"].startswith("export_") for line in lines)
    assert all(line["engine_ms"] > 0 for line in lines if line["op"].startswith("export_"))
    assert last["op"] == "goals"
