"""Products of one row in PyTorch, against loops in Python's own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from megahybrid_kernels.gemv import add_rms_norm_gemv, gated_rms_norm_gemv, swiglu_gemv
from tests.kernels.cases import one_row


def close(y, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert y.dtype == dtype and y.shape == (1, len(expected))
    assert max(map(lambda a, b: abs(a - b), y[0].tolist(), expected)) <= tolerance * max(map(abs, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_equal_loops(dtype):
    x = one_row(24, 10, dtype)
    values = {name: each.double().flatten().tolist() for name, each in x.items()}
    weight = x["weight"].double().tolist()
    times = lambda row: [math.fsum(a * b for a, b in zip(each, row, strict=True)) for each in weight]  # noqa: E731
    silu = lambda a: a / (1 + math.exp(-a))  # noqa: E731

    def normed(row, norm):
        scale = 1 / math.sqrt(math.fsum(a * a for a in row) / len(row) + 1e-6)
        return [a * scale * b for a, b in zip(row, norm, strict=True)]

    alone = add_rms_norm_gemv(x["x"], None, x["norm"], 1e-6, x["weight"])
    close(alone, times(normed(values["x"], values["norm"])), dtype)
    total = torch.empty_like(x["x"])
    summed = add_rms_norm_gemv(x["x"], x["other"], x["norm"], 1e-6, x["weight"], total)
    assert torch.equal(total, x["x"] + x["other"])
    close(summed, times(normed(total.double().flatten().tolist(), values["norm"])), dtype)
    close(
        swiglu_gemv(x["x"], x["other"], x["weight"]),
        times([silu(a) * b for a, b in zip(values["x"], values["other"], strict=True)]),
        dtype,
    )
    heads, gates = (x[name].view(1, 3, 8) for name in ("x", "other"))
    row = [a for head in heads[0].double().tolist() for a in normed(head, values["norm"][:8])]
    gated = gated_rms_norm_gemv(heads, gates, x["norm"][:8], 1e-6, x["weight"])
    close(gated, times([a * silu(b) for a, b in zip(row, values["other"], strict=True)]), dtype)


def test_what_is_refused():
    x = one_row(24, 10, torch.float32)
    with pytest.raises(ValueError, match="x has 12 values, but weight's rows have 24"):
        add_rms_norm_gemv(x["x"][:, :12], None, x["norm"], 1e-6, x["weight"])
    with pytest.raises(ValueError, match="residual and total are both to be shaped as x"):
        add_rms_norm_gemv(x["x"], x["other"], x["norm"], 1e-6, x["weight"])
    with pytest.raises(ValueError, match="up has 23 values"):
        swiglu_gemv(x["x"], x["other"][:, 1:], x["weight"])
    with pytest.raises(ValueError, match=r"but gate \(1, 24\)"):
        gated_rms_norm_gemv(x["x"].view(1, 3, 8), x["other"], x["norm"][:8], 1e-6, x["weight"])
