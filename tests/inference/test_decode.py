"""Decoding at fixed addresses against one pass over the whole sequence, and graphs against steps without."""

import importlib
from collections import Counter

import pytest
import torch

from megahybrid.inference import batch as batch_module
from megahybrid.inference.batch import Batch
from megahybrid.inference.decode import DecodeGraph, DecodeStep
from megahybrid.parallel.joined import join_weights
from megahybrid_kernels.gemv import triton as gemv
from tests.inference.oracle import BUFFER, PATTERNS, WINDOW, router_logits, tokens, whole
from tests.model import tiny

OPS = ["attention", "causal_conv1d", "gated_delta_rule", "lte_attention", "native_sparse_attention", "retention_router"]


def continued(model, rows, prompts):
    """Logits of every token from the prompts' last on, a batch's step at a time, and the batch."""
    batch = Batch(model, 64)
    batch.add([row[:n] for row, n in zip(rows, prompts, strict=True)])
    found = [[] for _ in rows]
    for step in range(len(rows[0]) - prompts[0] + 1):
        done, logits = batch.step()
        assert done == list(range(len(rows)))
        for row, each in zip(done, logits, strict=True):
            found[row].append(each.clone())
            if prompts[row] + step < len(rows[row]):
                batch.extend(row, rows[row][prompts[row] + step])
    return [torch.stack(logits) for logits in found], batch


@pytest.fixture
def recorded(monkeypatch):
    """Batches decode at fixed addresses, if not in a graph; says how often they began to."""
    begun = []

    class Recorded(DecodeStep):
        def __init__(self, *arguments):
            begun.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(batch_module, "takes_graph", lambda model: True)
    monkeypatch.setattr(batch_module, "DecodeGraph", Recorded)
    return begun


@pytest.mark.parametrize("pattern", PATTERNS)
def test_fixed_addresses(pattern, recorded):
    model, prompts = tiny.model(pattern), [3, 2 * WINDOW]
    rows = [tokens(n + 90, seed=n) for n in prompts]
    found, batch = continued(model, rows, prompts)
    for row, n, logits in zip(rows, prompts, found, strict=True):
        assert (logits - whole(model, row)[n - 1 :]).abs().max() < 1e-9
    # Only caches of all tokens ever move, from 64 slots to 128.
    assert len(recorded) == (2 if {*"FN"} & {*pattern} else 1)
    batch.keep([1])
    after, _ = batch_step_with(batch, 5)
    assert (after - whole(model, [*rows[1], 5])[-1]).abs().max() < 1e-9


def batch_step_with(batch, token):
    batch.extend(0, token)
    rows, logits = batch.step()
    return logits[0], rows


def test_sequences_join_and_leave_between_recorded_steps(recorded):
    model, first, second = tiny.model("GLSFN"), tokens(100, seed=1), tokens(120, seed=2)
    batch = Batch(model, 128)
    batch.add([first[:65]])
    batch.step()
    for token in first[65:80]:
        batch_step_with(batch, token)
    batch.add([second[:90]])
    for one, other in zip(first[80:], [None, *second[90:109]], strict=True):
        batch.extend(0, one)
        if other is not None:
            batch.extend(1, other)
        _, logits = batch.step()
    assert (logits[0] - whole(model, first)[-1]).abs().max() < 1e-9
    assert (logits[1] - whole(model, second[:109])[-1]).abs().max() < 1e-9
    batch.keep([1])
    for token in second[109:]:
        logits, _ = batch_step_with(batch, token)
    assert (logits - whole(model, second)[-1]).abs().max() < 1e-9
    assert len(recorded) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="puts CPU tensors through the interpreter")
@pytest.mark.parametrize(
    "pattern", [pytest.param(each, marks=[pytest.mark.slow] * (len(each) == 1)) for each in PATTERNS]
)
def test_triton_steps(pattern, recorded, monkeypatch):
    for op in OPS:
        monkeypatch.setattr(importlib.import_module(f"megahybrid_kernels.{op}"), "takes_triton", lambda *_: True)
    model, prompts = tiny.model(pattern, dtype=torch.float32), [2, WINDOW + 1]
    rows = [tokens(n + WINDOW + 2 * BUFFER, seed=n) for n in prompts]
    found, _ = continued(model, rows, prompts)
    monkeypatch.undo()
    for row, n, logits in zip(rows, prompts, found, strict=True):
        assert (logits - whole(model, row)[n - 1 :]).abs().max() < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="puts CPU tensors through the interpreter")
@pytest.mark.parametrize("joined", [False, True])
def test_a_single_sequence_has_products_of_one_row(joined, recorded, monkeypatch):
    """Norms and SwiGLU are made along with the products that read them, what two sequences decode is not."""
    launched = []
    for name in ("norm_kernel", "gated_norm_kernel", "swiglu_kernel"):
        kernel = getattr(gemv, name)
        monkeypatch.setattr(gemv, name, Noted(kernel, launched))
    monkeypatch.setattr("megahybrid_kernels.gemv.takes_triton", lambda *_: True)
    model, row = tiny.model("GLSFN", dtype=torch.float32), tokens(12, seed=3)
    if joined:
        join_weights(model)
    ((logits,), _) = continued(model, [row], [9])
    counts = Counter(launched)
    assert counts["gemv_norm_kernel"] == 2 * joined * counts["gemv_swiglu_kernel"]
    assert 5 * counts["gemv_gated_norm_kernel"] == counts["gemv_swiglu_kernel"] > 5
    launched.clear()
    continued(model, [row, row], [9, 9])
    assert not launched
    monkeypatch.setattr("megahybrid.mixers.gdn.module.GatedDeltaNet.only_projects", False)  # one of five layers
    ((others,), _) = continued(model, [row], [9])
    assert torch.allclose(others, logits, rtol=1e-5, atol=1e-5)
    assert 5 * Counter(launched)["gemv_norm_kernel"] == 9 * joined * Counter(launched)["gemv_swiglu_kernel"]
    monkeypatch.undo()
    assert (logits - whole(model, row)[8:]).abs().max() < 1e-4


class Noted:
    """A kernel that says when it is launched."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, programs):
        self.launched.append(self.kernel.name)
        return self.kernel[programs]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="puts CPU tensors through the interpreter")
def test_triton_pieces(monkeypatch):
    """A prompt in pieces, then another one that begins beside the first one's decode."""
    for op in OPS:
        monkeypatch.setattr(importlib.import_module(f"megahybrid_kernels.{op}"), "takes_triton", lambda *_: True)
    model, first, second = tiny.model("GL", dtype=torch.float32), tokens(43, seed=1), tokens(30, seed=2)
    batch, found = Batch(model, 14), []
    batch.add([first[:40]])
    while not batch.step()[0]:
        pass
    batch.add([second])
    for token in first[40:]:
        batch.extend(0, token)
        rows, logits = batch.step()
        found.append(logits)
    monkeypatch.undo()
    assert rows == [0, 1]
    for n, logits in enumerate(found, 40):
        assert (logits[0] - whole(model, first)[n]).abs().max() < 1e-4
    assert (found[-1][1] - whole(model, second)[-1]).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [128, 23])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_in_float32(pattern, chunk):
    """On a GPU where there is one, by the kernels that it runs: a long prompt beside a short one that decodes."""
    rows, seen, read = [tokens(60, seed=n) for n in (5, 6)], [], [57, 10]
    double = tiny.model(pattern)
    with router_logits(seen):
        expected = [whole(double, row) for row in rows]
    assert all(logits.abs().min() > 1e-4 for logits in seen), "a keep decision is too close: choose other seeds"
    batch = Batch(tiny.model(pattern, dtype=torch.float32).to("cuda" if torch.cuda.is_available() else "cpu"), chunk)
    batch.add([row[:n] for row, n in zip(rows, read, strict=True)])
    while read[0] < 60:
        done, logits = batch.step()
        for row, each in zip(done, logits, strict=True):
            assert (each.cpu() - expected[row][read[row] - 1]).abs().max() < 1e-4
            batch.extend(row, rows[row][read[row]])
            read[row] += 1
    assert read[1] > 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_graph_is_bit_equal(pattern, dtype, monkeypatch):
    model, prompts = tiny.model(pattern, dtype=dtype).cuda(), [3, 2 * WINDOW]
    rows = [tokens(n + 90, seed=n) for n in prompts]
    begun = []

    class Counted(DecodeGraph):
        def __init__(self, *arguments):
            begun.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(batch_module, "DecodeGraph", Counted)
    replayed, _ = continued(model, rows, prompts)
    assert begun
    monkeypatch.setattr(batch_module, "takes_graph", lambda model: False)
    expected, _ = continued(model, rows, prompts)
    for one, other in zip(replayed, expected, strict=True):
        assert torch.equal(one, other) and torch.equal(one.argmax(-1), other.argmax(-1))
