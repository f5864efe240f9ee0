"""Linear + cross-entropy against closed forms in float64, in PyTorch and in Triton, on one rank and on several."""

from __future__ import annotations

import pytest
import torch

from megahybrid_kernels.linear_cross_entropy import IGNORED, chunks, linear_cross_entropy, reference
from megahybrid_kernels.linear_cross_entropy import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Norm of the error by the norm; bf16 logits are rounded, too, by the interpreter towards zero.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}
BACKENDS = ["torch", "triton"]
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def small_chunks_and_poisoned_memory(monkeypatch, poisoned_memory):
    """Several chunks, and several blocks a row; what is left unwritten is NaN."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(chunks, "_TOKENS", 4)
    monkeypatch.setattr(kernels, "_BLOCK", 64)


def use(backend, monkeypatch):
    monkeypatch.setattr(chunks, "takes_triton", lambda *_: backend == "triton")


def make_inputs(tokens, hidden, vocabulary, dtype):
    """x, weight, labels, some ignored, and token weights, some 0."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, hidden, generator=generator).to(DEVICE, dtype) for n in (tokens, vocabulary))
    labels, weights = torch.randint(vocabulary, (tokens,), generator=generator), torch.rand(tokens, generator=generator)
    labels[3::7], weights[2::5] = IGNORED, 0
    return x, weight, labels.to(DEVICE), weights.to(DEVICE)


def closed_forms(x, weight, labels, weights, z_loss, upstream):
    """Sum, losses, normalisers, dx, dweight, by hand."""
    x, weight = x.double(), weight.double()
    logits, counted = x @ weight.T, labels != IGNORED
    weights = counted.double() if weights is None else weights.double() * counted
    exponentials = logits.exp()
    normalisers = exponentials.sum(1).log()
    rows = torch.arange(len(x), device=x.device)[counted]
    losses = torch.zeros_like(normalisers)
    losses[rows] = normalisers[rows] - logits[rows, labels[rows]]
    slope = exponentials / exponentials.sum(1, keepdim=True) * (1 + 2 * z_loss * normalisers)[:, None]
    slope[rows, labels[rows]] -= 1
    slope *= upstream * weights[:, None]
    total = (weights * (losses + z_loss * normalisers**2)).sum()
    return total, losses, normalisers, slope @ weight, slope.T @ x


def assert_same(actual, expected, tolerance):
    for number, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.shape == y.shape
        assert ((x.double() - y).norm() / y.norm()).item() <= tolerance, number


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tokens, hidden, vocabulary, z_loss", [(1, 3, 7, 0.3), (37, 16, 150, 0.0), (50, 8, 64, 0.02)])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_and_gradients(weighted, tokens, hidden, vocabulary, z_loss, dtype, backend, monkeypatch):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels take at most 32 bits")
    use(backend, monkeypatch)
    x, weight, labels, weights = make_inputs(tokens, hidden, vocabulary, dtype)
    weights = weights if weighted else None
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    outputs = linear_cross_entropy(*leaves, labels, weights, z_loss)
    actual = [*outputs, *torch.autograd.grad(outputs[0], leaves, torch.full_like(outputs[0], -0.75))]
    assert [y.dtype for y in actual] == [*[torch.promote_types(dtype, torch.float32)] * 3, dtype, dtype]
    expected = closed_forms(x.detach(), weight.detach(), labels, weights, z_loss, -0.75)
    assert_same(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_differentiated_is_the_same_without(backend, monkeypatch):
    use(backend, monkeypatch)
    x, weight, *others = make_inputs(37, 16, 150, torch.float32)
    plain = linear_cross_entropy(x, weight, *others, 0.02)
    (dx,) = torch.autograd.grad(linear_cross_entropy(x.requires_grad_(), weight, *others, 0.02)[0], x)
    whole = linear_cross_entropy(x, weight.requires_grad_(), *others, 0.02)
    again = torch.autograd.grad(whole[0], (x, weight))
    assert torch.equal(dx, again[0])
    with torch.no_grad():
        without = linear_cross_entropy(x, weight, *others, 0.02)
    for results in (plain, without):
        torch.testing.assert_close(results, tuple(y.detach() for y in whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_1_change_no_bit(dtype, backend, monkeypatch):
    use(backend, monkeypatch)
    x, weight, labels, weights = make_inputs(37, 16, 150, dtype)
    leaves, results = [x.requires_grad_(), weight.requires_grad_()], []
    for ones in (None, torch.ones_like(weights)):
        outputs = linear_cross_entropy(*leaves, labels, ones, 0.02)
        results.append([*outputs, *torch.autograd.grad(outputs[0], leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("backend", [reference, kernels])
def test_parts_of_a_vocabulary_make_the_whole(backend):
    """As ranks do it, one after another: statistics, their combination, and each part's gradient."""
    _, logits, _, _ = make_inputs(9, 300, 20, torch.float32)
    labels = torch.arange(20, device=DEVICE) * 15
    weights = labels.remainder(4).float() / 2
    labels[5], weights[5] = IGNORED, 0
    logits *= 30  # some rows' maxima lie far apart
    parts = [part.contiguous() for part in logits.split(100, 1)]
    found = [backend.statistics(part, labels - 100 * rank) for rank, part in enumerate(parts)]
    peak = torch.stack([each[0] for each in found]).max(0).values
    total = sum(each[1] * (each[0] - peak).exp() for each in found)
    normaliser = peak + total.log()
    exact = logits.double().logsumexp(1)
    torch.testing.assert_close(normaliser.double(), exact, rtol=1e-6, atol=0)
    targets = sum(each[2] for each in found)
    counted = (labels != IGNORED).nonzero()[:, 0]
    assert torch.equal(targets[counted], logits[counted, labels[counted]])
    for rank, part in enumerate(parts):
        backend.gradient_(part, labels - 100 * rank, weights, normaliser, 0.01)
    slope = (logits.double() - exact[:, None]).exp() * (1 + 0.02 * exact)[:, None]
    slope[counted, labels[counted]] -= 1
    slope *= weights[:, None]
    torch.testing.assert_close(torch.cat(parts, 1).double(), slope, rtol=1e-4, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    x, weight, labels, weights = make_inputs(3, 4, 5, torch.float32)
    with pytest.raises(ValueError, match="do not fit together"):
        linear_cross_entropy(x, weight[:, 1:], labels)
    with pytest.raises(ValueError, match="do not fit together"):
        linear_cross_entropy(x, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match="token_weights"):
        linear_cross_entropy(x, weight, labels, weights[1:])
