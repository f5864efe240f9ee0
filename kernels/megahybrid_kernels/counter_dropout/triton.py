"""Dropout's keys in Triton, all layers' in one launch, where PyTorch takes some 190 small ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.integers import cdiv
from megahybrid_kernels.launch import kernel

_BLOCK = 256


@triton.jit
def mix(x):
    """lowbias32 of uint32, as of `reference`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _absorb(state, low, high):
    state = mix(state ^ (low.to(tl.uint32) * 0x9E3779B9))
    return mix(state ^ (high.to(tl.uint32) * 0x846CA68B))


@triton.jit
def _fold(key, low, high):
    """`reference.fold` of a key in int64 and a value in two halves."""
    state = _absorb(tl.full(key.shape, 0x9E3779B9, tl.uint32), key, key >> 32)
    return _absorb(state, low, high).to(tl.int64)


@kernel(do_not_specialize=["seed_low", "seed_high", "step_low", "step_high", "tokens", "layers"])
def keys_kernel(
    samples, positions, keys, seed_low, seed_high, step_low, step_high, tokens, layers, BLOCK: tl.constexpr
):  # fmt: skip
    """The keys of BLOCK tokens in all layers."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = token < tokens
    key = _fold(tl.load(samples + token, mask=mask, other=0), seed_low, seed_high)
    position = tl.load(positions + token, mask=mask, other=0)
    key = _fold(_fold(key, step_low, step_high), position, position >> 32)
    place, layer = keys + token, tl.zeros([BLOCK], tl.int32)
    for _ in range(layers):
        tl.store(place, _fold(key, layer, layer >> 31), mask=mask)
        place += tokens
        layer += 1


def _halves(value: int) -> tuple[int, int]:
    """Of 64 bits, as kernels get ints of 32."""
    low, high = value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def dropout_keys(samples: Tensor, positions: Tensor, seed: int, step: int, layers: int) -> Tensor:
    """See `megahybrid_kernels.dropout_keys`."""
    tokens = len(samples)
    keys = torch.empty(layers, tokens, dtype=torch.int64, device=samples.device)
    keys_kernel[cdiv(tokens, _BLOCK)](
        samples.contiguous(), positions.contiguous(), keys, *_halves(seed), *_halves(step), tokens, layers, BLOCK=_BLOCK
    )
    return keys
