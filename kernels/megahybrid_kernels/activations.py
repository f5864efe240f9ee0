"""Activations inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to fp32's last digits where it is small too."""
    small = tl.exp(-tl.abs(x))
    near_one = 1.0 + small
    # log1p: what rounding took from 1 + small is put back by the quotient (Goldberg 1991, theorem 4).
    spread = near_one - 1.0
    log1p = tl.where(spread == 0.0, small, tl.log(near_one) * (small / tl.where(spread == 0.0, 1.0, spread)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def silu_slope(x, sigmoid):
    """The derivative of `silu`, where sigmoid(x) is at hand."""
    return sigmoid * (1 + x * (1 - sigmoid))
