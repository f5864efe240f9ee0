"""A token's row times a matrix, and what makes the row: one launch of decoding a single sequence.

With `ahead` it reads the matrix while launches before it still run, on GPUs that can: none of those may write it.
"""

from __future__ import annotations

from torch import Tensor

from megahybrid_kernels.backend import takes_triton
from megahybrid_kernels.gemv import reference

__all__ = ["add_rms_norm_gemv", "gated_rms_norm_gemv", "swiglu_gemv", "takes_gemv"]

# Of a head whose norm a program makes by itself.
_LARGEST_HEAD_DIM = 1024


def takes_gemv(x: Tensor, weight: Tensor, head_dim: int = 1) -> bool:
    """Whether kernels join the product of x, if it is one row, with weight `[out, in]` to what makes that row.

    head_dim: of heads that have a norm of their own.
    """
    one_row = x.numel() == weight.shape[1] and weight.stride(1) == 1 and x.dtype == weight.dtype
    return one_row and head_dim <= _LARGEST_HEAD_DIM and takes_triton(x, weight)


def add_rms_norm_gemv(
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    total: Tensor | None = None,
    *,
    ahead: bool = False,
) -> Tensor:
    """weight · rms_norm(x + residual), the sum also written to total; of x alone without both. Not differentiable.

    Args:
        x: of any shape with one row, `in` values.
        residual, total: contiguous, shaped as x and of its dtype.
        norm: `[in]`, the norm's weight.
        eps: added to the mean square.
        weight: `[out, in]`.
        ahead: weight may be read before launches before this one have ended, so none of these may write it.

    Returns `[1, out]` in x's dtype. The norm is of the sum as rounded to that dtype, as `add_rms_norm`'s; itself it is
    not rounded. Arithmetic is in at least float32.

    Raises:
        ValueError: x is not one row as long as norm and weight's rows, or residual and total are not both shaped as x,
            or both None.
    """
    _check(x, weight, norm=norm)
    if {None if each is None else each.shape for each in (residual, total)} not in ({None}, {x.shape}):
        raise ValueError("residual and total are both to be shaped as x, or both None")
    return _backend(x, residual, norm, weight, total).add_rms_norm_gemv(x, residual, norm, eps, weight, total, ahead)


def gated_rms_norm_gemv(
    x: Tensor, gate: Tensor, norm: Tensor, eps: float, weight: Tensor, *, ahead: bool = False
) -> Tensor:
    """weight · gated_rms_norm(x, gate) of all heads beside each other. Not differentiable.

    Args:
        x: `[1, heads, head_dim]`.
        gate: shaped as x, before SiLU.
        norm: `[head_dim]`, the norm's weight.
        eps: added to the mean square.
        weight: `[out, heads * head_dim]`.
        ahead: as `add_rms_norm_gemv`'s.

    Returns `[1, out]` in x's dtype. Arithmetic is in at least float32.

    Raises:
        ValueError: x is not one row as long as weight's, gate not shaped as x, or norm not as long as a head.
    """
    _check(x, weight)
    if gate.shape != x.shape or norm.shape != x.shape[-1:]:
        raise ValueError(
            f"x is {tuple(x.shape)}, but gate {tuple(gate.shape)} and the norm's weight {tuple(norm.shape)}"
        )
    return _backend(x, gate, norm, weight).gated_rms_norm_gemv(x, gate, norm, eps, weight, ahead)


def swiglu_gemv(gate: Tensor, up: Tensor, weight: Tensor, *, ahead: bool = False) -> Tensor:
    """weight · (silu(gate) * up). Not differentiable.

    Args:
        gate, up: `[1, in]`.
        weight: `[out, in]`.
        ahead: as `add_rms_norm_gemv`'s.

    Returns `[1, out]` in up's dtype. Arithmetic is in at least float32.

    Raises:
        ValueError: gate or up is not one row as long as weight's.
    """
    _check(gate, weight, up=up)
    return _backend(gate, up, weight).swiglu_gemv(gate, up, weight, ahead)


def _backend(x: Tensor, *others: Tensor | None):
    if takes_triton(x, *others):
        from megahybrid_kernels.gemv import triton as backend
    else:
        backend = reference
    return backend


def _check(x: Tensor, weight: Tensor, **others: Tensor) -> None:
    for name, each in {"x": x, **others}.items():
        if each.numel() != weight.shape[1]:
            raise ValueError(f"{name} has {each.numel()} values, but weight's rows have {weight.shape[1]}")
