"""The router's Triton kernels: on a GPU where there is one, else on Triton's interpreter with small shapes."""

import pytest
import torch
from cases import interpreted
from oracles_lte import FLOAT32_TOLERANCE, assert_same_gradients, leaf
from test_retention_router import leaves, named, random_router

from megahybrid_kernels import Sequences, targets
from megahybrid_kernels.retention_router import Dropout, RouterParameters, RouterState, reference
from megahybrid_kernels.retention_router import triton as router
from megahybrid_kernels.retention_router.reference import retention_scores_streamed
from megahybrid_kernels.retention_router.triton_step import retention_scores_step

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(parameters: RouterParameters) -> RouterParameters:
    return RouterParameters(
        *(tuple(y.to(DEVICE) for y in x) for x in parameters[:2]), *(x.to(DEVICE) for x in parameters[2:])
    )


SHAPES = [((1,), 1, 16), ((3, 1, 2, 40, 90), 2, 8), ((57, 64), 3, 24)]
FILTERS = [(3, 2), (5, 1)]
EVERY = [(*shape, *each, dropped) for shape in SHAPES for each in FILTERS for dropped in (0.0, 0.4)]
# Every pair of a shape, a filter, and with dropout or without.
PAIRS = {(*shape, *each, 0.4 * ((n + m) % 2)) for n, shape in enumerate(SHAPES) for m, each in enumerate(FILTERS)}


@pytest.mark.parametrize("lengths, heads, head_dim, kernel_size, dilation, probability", interpreted(PAIRS, EVERY))
def test_outputs_and_gradients(lengths, heads, head_dim, kernel_size, dilation, probability):
    """Against the PyTorch path in float64, which is held against a convolution in its own tests."""
    tokens = sum(lengths)
    k, v = (leaf(tokens, heads, head_dim, seed=i, dtype=torch.float32) for i in range(2))
    actual = leaves(random_router(heads, head_dim, 1, kernel_size), torch.float32)
    expected = leaves(actual, torch.float64)
    keys = torch.arange(tokens) * 2654435761 % 2**32
    dropout = Dropout(probability, keys, channel_offset=2 * head_dim * 5) if probability else None
    on_device = Dropout(probability, keys.to(DEVICE), 2 * head_dim * 5) if probability else None
    logits = router.retention_logits(
        k[0].to(DEVICE), v[0].to(DEVICE), moved(actual), Sequences.of(lengths, DEVICE), on_device, dilation
    )
    truth = reference.retention_logits(k[1], v[1], expected, Sequences.of(lengths), dropout, dilation)
    pairs = {"k": k, "v": v} | {name: (x, named(expected)[name]) for name, x in named(actual).items()}
    assert_same_gradients(logits.cpu(), truth, pairs, FLOAT32_TOLERANCE)


@pytest.mark.skipif(DEVICE == "cuda", reason="heads too wide for a smaller GPU: test_targets compiles what it takes")
@pytest.mark.parametrize("table", ["blackwell", "ampere"])
def test_outputs_and_gradients_by_other_tables(table, monkeypatch):
    monkeypatch.setattr(targets, "FORCED", table)
    test_outputs_and_gradients((3, 20), 1, 72, 3, 2, 0.4)


@pytest.mark.parametrize("others", [(True, True), (True, False), (False, False)])
def test_scores_add_to_the_gradients_of_other_uses(others):
    """Of k and v, which may have none."""
    lengths, heads, head_dim = (3, 40), 2, 8
    k, v = (leaf(sum(lengths), heads, head_dim, seed=i, dtype=torch.float32) for i in range(2))
    actual = leaves(random_router(heads, head_dim, 1), torch.float32)
    expected = leaves(actual, torch.float64)

    def result(backend, k, v, parameters, device):
        scores, *after = backend.retention_scores(k, v, parameters, Sequences.of(lengths, device))
        return scores + sum(x.sin().sum(-1) for x, used in zip(after, others, strict=True) if used)

    found = result(router, k[0].to(DEVICE), v[0].to(DEVICE), moved(actual), DEVICE)
    truth = result(reference, k[1], v[1], expected, "cpu")
    pairs = {"k": k, "v": v} | {name: (x, named(expected)[name]) for name, x in named(actual).items()}
    assert_same_gradients(found.cpu(), truth, pairs, FLOAT32_TOLERANCE)


def test_k_alone_has_its_gradient_from_others():
    (k, _), (v, _) = (leaf(5, 2, 8, seed=i, dtype=torch.float32) for i in range(2))
    parameters = leaves(random_router(2, 8, 1), torch.float32)
    _, after, _ = router.retention_scores(k.to(DEVICE), v.to(DEVICE), moved(parameters), Sequences.of((5,), DEVICE))
    after.sum().backward()
    assert torch.equal(k.grad, torch.ones_like(k)) and v.grad is None and parameters.projection.grad is None


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_layers_than_a_launch_serves(count):
    lengths, heads, head_dim = (3, 40), 2, 8
    weights, biases, *_ = random_router(heads, head_dim, 1)
    channels = (head_dim, head_dim // 2)[count - 1]
    projection = torch.randn(heads, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = RouterParameters(weights[:count], biases[:count], projection, torch.zeros(heads, dtype=torch.float64))
    k, v = (leaf(sum(lengths), heads, head_dim, seed=i, dtype=torch.float32) for i in range(2))
    actual = leaves(whole, torch.float32)
    expected = leaves(actual, torch.float64)
    sequences = Sequences.of(lengths, DEVICE)
    logits = router.retention_logits(k[0].to(DEVICE), v[0].to(DEVICE), moved(actual), sequences)
    truth = reference.retention_logits(k[1], v[1], expected, Sequences.of(lengths))
    pairs = {"k": k, "v": v} | {name: (x, named(expected)[name]) for name, x in named(actual).items()}
    assert_same_gradients(logits.cpu(), truth, pairs, FLOAT32_TOLERANCE)


def test_strided_inputs():
    lengths, heads, head_dim = (30, 12), 2, 16
    fused = torch.randn(42, 3 * heads, head_dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    parameters, sequences = (
        moved(leaves(random_router(heads, head_dim, 1), torch.float32)),
        Sequences.of(lengths, DEVICE),
    )
    k, v = fused[:, :heads], fused[:, heads : 2 * heads]
    whole = router.retention_logits(k.contiguous(), v.contiguous(), parameters, sequences)
    assert torch.equal(router.retention_logits(k, v, parameters, sequences), whole)


@pytest.mark.parametrize("kernel_size, dilation", [(3, 2), (5, 1)])
@pytest.mark.parametrize("count, heads, head_dim", [(1, 2, 8), (19, 1, 24)])
def test_steps_equal_the_streamed_path(count, heads, head_dim, kernel_size, dilation):
    parameters = leaves(random_router(heads, head_dim, 1, kernel_size), torch.float32)
    parameters = RouterParameters(
        *(tuple(y.detach() for y in x) for x in parameters[:2]), *(x.detach() for x in parameters[2:])
    )
    generator = torch.Generator().manual_seed(3)
    state = RouterState.empty(count, parameters, dilation)
    fast = RouterState(tuple(x.to(DEVICE) for x in state.rows))
    starts = torch.arange(count) % 3 * 40
    for step in range(9):
        fused = torch.randn(count, 3 * heads, head_dim, generator=generator)
        k, v = fused[:, :heads], fused[:, heads : 2 * heads]
        sequences = Sequences.of((1,) * count, starts=starts + step)
        expected, state = retention_scores_streamed(k, v, parameters, sequences, state, dilation)
        k, v = (x.to(DEVICE)[:, part] for x, part in ((fused, slice(heads)), (fused, slice(heads, 2 * heads))))
        scores, fast = retention_scores_step(k, v, moved(parameters), (starts + step).to(DEVICE), fast, dilation)
        torch.testing.assert_close(scores.cpu(), expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
        for ours, theirs in zip(fast.rows, state.rows, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
