"""Kernels of one row's products: on a GPU where there is one, else on Triton's interpreter with small shapes."""

from __future__ import annotations

import pytest
import torch

from megahybrid_kernels.gemv import reference, takes_gemv, triton
from tests.kernels.cases import one_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value; the interpreter rounds to bf16 towards zero.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3}


def close(y, expected):
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= TOLERANCES[y.dtype] * expected.abs().max()


# Rows of the matrix that fill no program, one, several; and columns that fill no tile, one, several.
@pytest.mark.parametrize("heads, dim, out", [(3, 8, 10), (1, 7, 1), (5, 40, 170), (3, 700, 9), (40, 32, 33)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_products_equal_the_reference_in_float64(heads, dim, out, dtype):
    x = {name: each.to(DEVICE) for name, each in one_row(heads * dim, out, dtype).items()}
    exact = {name: each.double() for name, each in x.items()}
    total = torch.full_like(x["x"], torch.nan)
    y = triton.add_rms_norm_gemv(x["x"], x["other"], x["norm"], 1e-6, x["weight"], total)
    assert torch.equal(total, x["x"] + x["other"]) or DEVICE == "cpu"
    close(y, reference.add_rms_norm_gemv(total.double(), None, exact["norm"], 1e-6, exact["weight"], None))
    close(total, exact["x"] + exact["other"])
    alone = triton.add_rms_norm_gemv(x["x"], None, x["norm"], 1e-6, x["weight"], None)
    close(alone, reference.add_rms_norm_gemv(exact["x"], None, exact["norm"], 1e-6, exact["weight"], None))
    given = [x["x"], x["other"], x["weight"]]
    close(triton.swiglu_gemv(*given), reference.swiglu_gemv(*(each.double() for each in given)))
    of_heads = [x["x"].view(1, heads, dim), x["other"].view(1, heads, dim), x["norm"][:dim]]
    expected = reference.gated_rms_norm_gemv(*(each.double() for each in of_heads), 1e-6, exact["weight"])
    close(triton.gated_rms_norm_gemv(*of_heads, 1e-6, x["weight"]), expected)


@torch.no_grad()
def test_rows_of_a_wider_matrix_and_halves_of_a_product():
    x = {name: each.to(DEVICE) for name, each in one_row(96, 20, torch.float32).items()}
    wide = torch.cat([x["weight"], x["weight"] + 1], 1)[:, :96]
    gate, up = torch.cat([x["x"], x["other"]], 1).split(96, 1)
    assert torch.equal(triton.swiglu_gemv(gate, up, wide), triton.swiglu_gemv(x["x"], x["other"], x["weight"]))


@torch.no_grad()
def test_matrices_that_are_read_ahead():
    """A chain in which each launch reads what the one before has just written, many times: the same to the last bit."""
    inner, hidden, layers = (1408, 512, 40) if DEVICE == "cuda" else (24, 16, 2)
    generator = torch.Generator().manual_seed(1)
    new = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)  # noqa: E731
    first, norm, head_norm = new(1, hidden), new(hidden), new(8)
    weights = [(new(2 * inner, hidden), new(hidden, inner), new(hidden, hidden)) for _ in range(layers)]

    def chain(ahead):
        stream, x = first, first
        for into, out, last in weights:
            total = torch.empty_like(stream)
            y = triton.add_rms_norm_gemv(x, stream, norm, 1e-6, into, total, ahead)
            x = triton.swiglu_gemv(*y.split(inner, 1), out, ahead)
            heads = x.view(1, -1, 8)
            x, stream = triton.gated_rms_norm_gemv(heads, heads, head_norm, 1e-6, last, ahead), total
        return torch.cat([x, stream], 1)

    expected = chain(False)
    assert torch.isfinite(expected).all()
    assert torch.equal(chain(True), expected)
    if DEVICE == "cpu":
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(True)
    for _ in range(50):
        graph.replay()
        assert torch.equal(y, expected)


def test_what_kernels_join(monkeypatch):
    monkeypatch.setattr("megahybrid_kernels.gemv.takes_triton", lambda *_: True)
    weight = torch.zeros(5, 8)
    assert takes_gemv(torch.zeros(1, 1, 8), weight) and takes_gemv(torch.zeros(1, 2, 4), weight, 4)
    assert not takes_gemv(torch.zeros(2, 8), weight)
    assert not takes_gemv(torch.zeros(1, 8, dtype=torch.bfloat16), weight)
    assert not takes_gemv(torch.zeros(1, 5), weight.T) and not takes_gemv(torch.zeros(1, 8), weight, 2048)
