"""What the Triton kernels' wrappers allocate in a forward and backward pass."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megahybrid.config.schema import ModelConfig
from megahybrid.mixers import KINDS
from megahybrid.mixers.kind import MicroBatch
from megahybrid.mixers.nsa import NSAConfig
from megahybrid_kernels import Sequences
from megahybrid_kernels.native_sparse_attention import triton_score
from megahybrid_kernels.native_sparse_attention.triton import native_sparse_attention
from tests.scaling.test_memory import most_allocated, use_triton


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    use_triton(monkeypatch)


def most_bytes(lengths, nsa):
    """Most that a pass has allocated at a time, q, k, v and gates included, o not."""
    shapes = (nsa.num_heads, nsa.head_dim), *((nsa.num_kv_heads, nsa.head_dim),) * 2, (nsa.num_heads, 3)
    sequences, sizes = Sequences.of(lengths), (nsa.block_size, nsa.num_blocks, nsa.window_size)
    inputs = [torch.empty(sum(lengths), *shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]

    def both_passes():
        o = native_sparse_attention(*inputs, sequences, *sizes)[0].sum()
        return torch.autograd.grad(o, inputs)

    both_passes()  # tiles stay
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        both_passes()
    return most_allocated(profiled) + sum(x.nbytes for x in inputs)


@pytest.mark.parametrize("length", [1, 16, 33, 64, 100, 1000, 4096])
@pytest.mark.parametrize("block_size", [16, 64])
def test_the_plan_covers_packed_documents_of_any_length(length, block_size):
    tokens, nsa = 4096, NSAConfig(block_size=block_size)
    planned = KINDS["N"].activations(ModelConfig(nsa=nsa), MicroBatch(1, tokens, 2, 1))
    whole, rest = divmod(tokens, length)
    found = most_bytes((length,) * whole + (rest,) * (rest > 0), nsa)
    assert 0.9 < found / (tokens * (planned.saved + planned.backward)) < 1


@pytest.mark.parametrize("length", [1, 100, None])
def test_memory_is_linear_in_the_tokens(length, monkeypatch):
    """In short documents, or one of all tokens, of which sums of means have as many parts as any may have."""
    monkeypatch.setattr(triton_score, "_SCORES", 0)  # else a constant number of them at least
    nsa = NSAConfig(num_heads=2, num_kv_heads=1, head_dim=16, block_size=16, num_blocks=4)
    one, two = (most_bytes((length,) * (n // length) if length else (n,), nsa) for n in (2**15, 2**16))
    assert two < 2.01 * one
