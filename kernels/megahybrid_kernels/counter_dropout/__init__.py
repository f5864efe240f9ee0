"""Dropout whose mask is a hash of counters, so that it is the same in any layout, on any backend and on recompute."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.backend import takes_triton
from megahybrid_kernels.counter_dropout import reference
from megahybrid_kernels.counter_dropout.reference import fold, keep_mask

__all__ = ["dropout_keys", "fold", "keep_mask"]


def dropout_keys(samples: Tensor, positions: Tensor, seed: int, step: int, layers: int) -> Tensor:
    """Every layer's key for the dropout mask of each token, the same however tokens are batched and split.

    Args:
        samples: int64 `[tokens]`, the number of each token's sample in the data.
        positions: int64 `[tokens]`, of the token in its sample.
        seed, step: of the run; ints of up to 64 bits.
        layers: of the model.

    Returns:
        int64 `[layers, tokens]` of 32 bits: `fold` of sample, seed, step, position and layer, one after another.

    Raises:
        ValueError: the shapes differ, or the dtypes are others.
    """
    if samples.dim() != 1 or samples.shape != positions.shape:
        raise ValueError(f"samples are {list(samples.shape)} and positions {list(positions.shape)}, not one a token")
    if samples.dtype != torch.int64 or positions.dtype != torch.int64:
        raise ValueError(f"samples are {samples.dtype} and positions {positions.dtype}, not int64")
    if takes_triton(samples, positions, dtypes=(torch.int64,)):
        from megahybrid_kernels.counter_dropout import triton as backend
    else:
        backend = reference
    return backend.dropout_keys(samples, positions, seed, step, layers)
