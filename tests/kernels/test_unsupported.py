"""What an op says of its kernels' limits is what its dispatch does."""

from importlib import import_module

import pytest
import torch

from megahybrid_kernels import Sequences, targets

attention_op, delta_op, lte_op, nsa_op, router_op = (
    import_module(f"megahybrid_kernels.{op}")
    for op in ("attention", "gated_delta_rule", "lte_attention", "native_sparse_attention", "retention_router")
)
SEQUENCES = Sequences.of([1])
FP32, BF16 = torch.float32, torch.bfloat16


def zeros(dtype, *sizes):
    return [torch.zeros(size, dtype=dtype) for size in sizes]


def delta_rule(dtype, key_dim, value_dim):
    keys, values = (1, 1, key_dim), (1, 1, value_dim)
    inputs = zeros(dtype, keys, keys, values, (1, 1), (1, 1), (1,), (1,))
    return delta_op.gated_delta_rule(*inputs, SEQUENCES)


def lte(dtype, head_dim):
    return lte_op.lte_attention(*zeros(dtype, *[(1, 1, head_dim)] * 3, (1, 1)), SEQUENCES, 1, 0)


def lte_piece(dtype, head_dim):
    cache = lte_op.LTECache.empty(1, 1, head_dim, 1, 1, dtype=dtype)
    inputs = zeros(dtype, *[(1, 1, head_dim)] * 3, (1, 1))
    return lte_op.lte_attention_with_cache(*inputs, cache, SEQUENCES, 1, 0, 1, 0)


def nsa(dtype, head_dim, block_size):
    inputs = zeros(dtype, *[(1, 1, head_dim)] * 3, (1, 1, 3))
    return nsa_op.native_sparse_attention(*inputs, SEQUENCES, block_size, 3, 1)


def blocks(dtype, head_dim, block_size):
    return nsa_op.select_blocks(*zeros(dtype, *[(1, 1, head_dim)] * 2), SEQUENCES, block_size, 3)


def router_inputs(dtype, head_dim, layers):
    channels = [2 * head_dim >> layer for layer in range(layers + 1)]
    weights = zeros(dtype, *[(channels[n + 1], channels[n], 1) for n in range(layers)])
    biases = zeros(dtype, *[(channels[n + 1],) for n in range(layers)])
    parameters = router_op.RouterParameters(weights, biases, *zeros(dtype, (1, channels[-1]), (1,)))
    return *zeros(dtype, *[(1, 1, head_dim)] * 2), parameters


def router(dtype, head_dim, layers=3):
    return router_op.retention_logits(*router_inputs(dtype, head_dim, layers), SEQUENCES)


# The call, its op, the kernels' entry, and arguments that they take, and do not.
NSA = [(FP32, 256, 16), (BF16, 24, 64)], [(BF16, 264, 64), (FP32, 64, 8), (BF16, 64, 128)]
CASES = [
    (
        *(delta_rule, delta_op, "triton.gated_delta_rule"),
        *([(FP32, 256, 256), (BF16, 8, 256)], [(BF16, 257, 8), (FP32, 8, 257)]),
    ),
    (lte, lte_op, "triton.lte_attention", [(FP32, 256)], [(BF16, 264)]),
    (lte_piece, lte_op, "triton_prefill.lte_attention_piece", [(BF16, 256)], [(BF16, 264)]),
    (nsa, nsa_op, "triton.native_sparse_attention", *NSA),
    (blocks, nsa_op, "triton.select_blocks", *NSA),
    (
        *(router, router_op, "triton.retention_logits"),
        *([(FP32, 128), (BF16, 256)], [(FP32, 129), (BF16, 257), (BF16, 32, 4)]),
    ),
]


@pytest.mark.parametrize(("call", "op", "kernel", "taken", "refused"), CASES, ids=[case[0].__name__ for case in CASES])
def test_the_dispatch_does_what_the_op_says(call, op, kernel, taken, refused, monkeypatch):
    module, name = kernel.split(".")
    called = []
    monkeypatch.setattr(op, "takes_triton", lambda *_: True)
    monkeypatch.setattr(targets, "FORCED", "hopper")
    backend = import_module(f"{op.__name__}.{module}")
    monkeypatch.setattr(backend, name, lambda *args, **options: called.append(name))
    for each in [*taken, *refused]:
        called.clear()
        with torch.no_grad():
            call(*each)
        assert (op.unsupported(*each) is None) is bool(called) is (each in taken), each


def test_flash_attention_takes_what_it_says():
    class OnGPU:
        is_cuda = True

        def __init__(self, dtype, head_dim):
            self.dtype, self.shape = dtype, (1, 1, head_dim)

    for case, taken in {(BF16, 256): True, (BF16, 264): False, (BF16, 100): False, (FP32, 64): False}.items():
        assert attention_op._takes_varlen(OnGPU(*case)) is taken is (attention_op.unsupported(*case) is None)
