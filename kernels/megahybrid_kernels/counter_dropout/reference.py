"""The hash of dropout in PyTorch.

All arithmetic is modulo 2**32; the finaliser is lowbias32 (Chris Wellons' hash prospector), a better-mixing sibling of
murmur3's.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B

Counter = int | Tensor


def _mix(x: Counter) -> Counter:
    # Products overflow int64, which wraps and so keeps the low 32 bits right.
    x = ((x ^ (x >> 16)) * _FIRST) & _MASK
    x = ((x ^ (x >> 15)) * _SECOND) & _MASK
    return x ^ (x >> 16)


def _absorb(state: Counter, value: Counter) -> Counter:
    state = _mix(state ^ ((value & _MASK) * _GOLDEN & _MASK))
    return _mix(state ^ (((value >> 32) & _MASK) * _SECOND & _MASK))


def fold(key: int | Tensor, *values: int | Tensor) -> int | Tensor:
    """Combine a key with counters into a new key of 32 bits; the order of the values matters.

    Args:
        key: int or int64 tensor, for instance a seed or an earlier result.
        values: ints of up to 64 bits or int64 tensors, broadcast together.

    Returns:
        A value in `[0, 2**32)`: an int if all arguments are, else an int64 tensor.
    """
    state = _GOLDEN
    for value in (key, *values):
        state = _absorb(state, value)
    return state


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def keep_mask(keys: Tensor, layer: int, channels: Tensor, probability: float) -> Tensor:
    """bool, True where an element survives dropout.

    keys: int64 of 32 bits, one a token; channels: int64, the global number of each channel; the two are broadcast
    against each other. Each element is dropped with `probability`, independently for every (key, layer, channel).
    """
    # int32 throughout: half the memory traffic of int64, and its products wrap modulo 2**32 as wanted.
    x = keys.to(torch.int32) ^ fold(layer, channels).to(torch.int32)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _FIRST
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(_SECOND)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    # Flipping the sign bit orders signed numbers as unsigned ones.
    x ^= -(1 << 31)
    return x >= min(round(probability * (1 << 32)), _MASK) - (1 << 31)


def dropout_keys(samples: Tensor, positions: Tensor, seed: int, step: int, layers: int) -> Tensor:
    """See `megahybrid_kernels.dropout_keys`."""
    keys = fold(fold(fold(samples, seed), step), positions)
    return fold(keys, torch.arange(layers, device=keys.device).unsqueeze(1))
