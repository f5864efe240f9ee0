"""What tools/bench_nsa prints is judged, and what it is asked to try exists."""

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megahybrid_kernels.native_sparse_attention import reference
from tests.tools.scripts import TOOLS, loaded


@pytest.fixture(scope="module")
def bench():
    yield from loaded("bench_nsa")


def another(selection):
    """The first free block of the last token that leaves one out is another."""
    wrong = selection.clone()
    wrong[-1, :, 1] = torch.where(wrong[-1, :, 1] == 1, 2, 1)
    return wrong


def test_a_wrong_op_is_named(bench, monkeypatch):
    rows = importlib.import_module("nsa_rows")
    monkeypatch.setattr(rows, "union", lambda *_: SimpleNamespace(counts=torch.ones(1)))
    torch.manual_seed(0)
    row = bench.Row(85, 2, "hot", bench.TINY)
    inputs = row.inputs()

    def op(*x):
        return reference.native_sparse_attention(*x, row.sequences, *row.sizes.limits)

    right = rows.judge(row, op, inputs)
    assert right["flipped"] == 0 and all(0 < error < 3e-3 for error in right["errors"].values())
    with pytest.raises(SystemExit, match="are above"):
        rows.judge(row, lambda *x: (1.02 * op(*x)[0], op(*x)[1]), inputs)
    chosen = another(op(*inputs.values())[1])
    with pytest.raises(ValueError, match="token 169 selects"):
        rows.judge(
            row, lambda *x: reference.native_sparse_attention(*x, row.sequences, *row.sizes.limits, chosen), inputs
        )


@pytest.mark.parametrize("changes", ["atend=64,4,3", "attend=64", "columns=64,4,3", "keys=x"])
def test_a_launch_that_there_is_not_is_refused(bench, changes):
    with pytest.raises(ValueError, match=changes.partition("=")[0]):
        bench.tunings(changes, bench.PUBLISHED)
    with pytest.raises(ValueError, match="selected_programs"):
        bench.nsa_decode.check(changes)


def test_launches_are_changed_where_they_stand(bench):
    forward, backward = bench.tunings("attend=64,8,2,128 keys=32 columns=128", bench.PUBLISHED)
    assert (forward.attend.warps, forward.attend.registers, forward.columns, backward.keys) == (8, 128, 128, 32)
    before = bench.nsa_decode.triton_decode._PROGRAMS
    with bench.nsa_decode.changed("programs=7"):
        assert bench.nsa_decode.triton_decode._PROGRAMS == 7
    assert before == bench.nsa_decode.triton_decode._PROGRAMS


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", [["training", "--rows", "near"], ["decode", "--try", "programs=9"]], ids=lambda x: x[0]
)
def test_it_runs_at_toy_sizes(what, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, TOOLS / "bench_nsa", "--tiny", *what, "--out", tmp_path / "lines"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    ours = [line for line in lines if line["op"].startswith("native_sparse_attention")]
    assert len(ours) == (1 if what[0] == "training" else 8)
    assert all(line["bit_equal_repeat"] and "failed" not in line for line in ours)
