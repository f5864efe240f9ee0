from types import SimpleNamespace

import pytest
import torch

from megahybrid_kernels import Sequences
from tests.tools.scripts import loaded


@pytest.fixture(scope="module")
def bench():
    yield from loaded("bench")


def right(x):
    return x.square()


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2.01 * ctx.saved_tensors[0] * grad


def case(bench, op, monkeypatch):
    """A case whose public op is `op` and whose reference squares."""
    made = bench.Case(
        "square",
        "square",
        "square",
        "n=64",
        (64,),
        lambda dtype, generator: {"x": torch.randn(64, generator=generator).to(dtype)},
        lambda op, inputs, sequences: op(inputs["x"]),
    )
    module = SimpleNamespace(square=op, reference=SimpleNamespace(square=right))
    monkeypatch.setattr(bench.Case, "load", lambda self: module)
    return made


@pytest.mark.parametrize(
    ("op", "culprit"),
    [
        (lambda x: x.square() * 1.001, "output"),
        (lambda x: torch.full_like(x, torch.nan) * x, "output"),
        (WrongGradient.apply, "d x"),
    ],
)
def test_a_wrong_op_gets_no_speed(bench, monkeypatch, op, culprit):
    monkeypatch.setattr(bench, "milliseconds", lambda *_: pytest.fail("a wrong op was timed"))
    wrong = case(bench, op, monkeypatch)
    monkeypatch.setattr(bench, "picked", lambda *_: {"triton": op, "reference": right})
    with pytest.raises(bench.WrongResult, match=culprit):
        bench.measure(wrong, torch.device("cpu"), torch.float32)


def test_a_right_op_gets_a_row_a_direction(bench, monkeypatch):
    rows = bench.measure(case(bench, lambda x: x * x, monkeypatch), torch.device("cpu"), torch.float32)
    assert {(row["backend"], row["direction"]) for row in rows} == {
        (backend, direction) for backend in ("triton", "reference") for direction in ("forward", "forward+backward")
    }
    assert all(list(row) == bench.COLUMNS for row in rows)
    assert all(0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in rows)


def test_peak_bytes_counts_what_is_held_at_once(bench):
    def call():
        first = torch.empty(1 << 20)
        del first
        return [torch.empty(1 << 19), torch.empty(1 << 18)]

    assert bench.peak_bytes(call, torch.device("cpu")) == 4 << 20


def test_exits_are_judged_by_playing_the_buffer(bench):
    (exits,) = [each for each in bench.SIZES["small"].cases() if each.op == "exit_positions"]
    inputs, sequences = exits.make(torch.float32, torch.Generator().manual_seed(0)), Sequences.of(exits.lengths)
    right = exits.call(exits.public(), inputs, sequences)
    assert exits.judge(right, inputs, sequences) == 0
    seen = (right > sequences.positions[:, None] + 63 + 1) & (right < 300)
    assert exits.judge(torch.where(seen, right + 1, right), inputs, sequences) > 0
