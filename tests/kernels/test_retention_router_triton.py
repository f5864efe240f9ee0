"""The router's Triton kernels: on a GPU where there is one, else on Triton's interpreter with small shapes."""

import pytest
import torch
from oracles_lte import FLOAT32_TOLERANCE, assert_same_gradients, leaf
from test_retention_router import leaves, named, random_router

from megahybrid_kernels import Sequences
from megahybrid_kernels.retention_router import Dropout, RouterParameters, reference
from megahybrid_kernels.retention_router import triton as router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(parameters: RouterParameters) -> RouterParameters:
    return RouterParameters(
        *(tuple(y.to(DEVICE) for y in x) for x in parameters[:2]), *(x.to(DEVICE) for x in parameters[2:])
    )


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("probability", [0.0, 0.4])
@pytest.mark.parametrize("kernel_size, dilation", [(3, 2), (5, 1)])
@pytest.mark.parametrize("lengths, heads, head_dim", [((1,), 1, 16), ((3, 1, 2, 40, 90), 2, 8), ((57, 64), 3, 24)])
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
