"""Rotary position embedding."""

from __future__ import annotations

from torch import Tensor

from megahybrid_kernels.backend import takes_triton
from megahybrid_kernels.rotary import reference

__all__ = ["rotary", "rotary_of_both"]


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by the angle position * theta^(-2i/D), over the whole head.

    Su et al., "RoFormer", arXiv 2104.09864, equation 34, with the halves paired as GPT-NeoX does. Angles are reduced to
    one turn exactly, at any position, and then float32, float64 for a float64 x. x is differentiable.

    Args:
        x: `[tokens, heads, head_dim]`.
        positions: int64 `[tokens]`, as `Sequences.positions`.
        theta: base of the wavelengths.

    Returns `[tokens, heads, head_dim]` in x's dtype.

    Raises:
        ValueError: an odd head_dim, or positions that are not one per token.
    """
    _check(x, positions)
    if takes_triton(x, positions):
        from megahybrid_kernels.rotary import triton as backend
    else:
        backend = reference
    return backend.rotary(x, positions, theta)


def rotary_of_both(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """`rotary` of q and of k `[tokens, their heads, head_dim]`, which takes a GPU one launch."""
    if q.dtype != k.dtype or q.shape[2] != k.shape[2] or not takes_triton(q, k, positions):
        return rotary(q, positions, theta), rotary(k, positions, theta)
    _check(q, positions), _check(k, positions)
    from megahybrid_kernels.rotary.triton import rotary_of_both

    return rotary_of_both(q, k, positions, theta)


def _check(x: Tensor, positions: Tensor) -> None:
    if x.shape[-1] % 2:
        raise ValueError(f"rotary needs an even head_dim, not {x.shape[-1]}")
    if positions.shape != x.shape[:1]:
        raise ValueError(f"positions is {tuple(positions.shape)}, but x has {x.shape[0]} tokens")
