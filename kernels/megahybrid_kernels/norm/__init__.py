"""Root-mean-square norm over the last dimension: plain, with an output gate, and of a sum."""

from __future__ import annotations

from torch import Tensor

from megahybrid_kernels.backend import takes_triton
from megahybrid_kernels.norm import reference

__all__ = ["add_rms_norm", "gated_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, arXiv 1910.07467, equation 4).

    Args:
        x: `[..., dim]`.
        weight: `[dim]`.
        eps: added to the mean square.

    Returns `[..., dim]` in x's dtype; arithmetic is in at least float32. x and weight are differentiable.

    Raises:
        ValueError: weight is not as long as x's last dimension.
    """
    _check_weight(x, weight)
    return _backend(x, weight).rms_norm(x, weight, eps)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x) * weight * silu(gate), how Gated DeltaNet ends (Yang et al., arXiv 2412.06464, section 3.4).

    Args:
        x: `[..., dim]`, for a mixer `[tokens, heads, head_dim]`.
        gate: shaped as x, before SiLU.
        weight: `[dim]`, shared by heads.
        eps: added to the mean square.

    Returns `[..., dim]` in x's dtype; arithmetic is in at least float32. x, gate and weight are differentiable.

    Raises:
        ValueError: gate is not shaped as x, or weight is not as long as the last dimension.
    """
    _check_weight(x, weight)
    if gate.shape != x.shape:
        raise ValueError(f"gate is {tuple(gate.shape)}, but x is {tuple(x.shape)}")
    return _backend(x, gate, weight).gated_rms_norm(x, gate, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm(x + residual) and x + residual, what a residual stream needs between two sublayers.

    Args:
        x: `[..., dim]`.
        residual: of x's shape and dtype.
        weight: `[dim]`.
        eps: added to the mean square.

    Returns the norm and the sum, `[..., dim]` in x's dtype; the norm is of the sum as rounded to that dtype, and its
    arithmetic in at least float32. x, residual and weight are differentiable.

    Raises:
        ValueError: residual is not shaped as x or of its dtype, or weight is not as long as the last dimension.
    """
    _check_weight(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {tuple(residual.shape)} in {residual.dtype}, but x is {tuple(x.shape)} in {x.dtype}"
        )
    return _backend(x, residual, weight).add_rms_norm(x, residual, weight, eps)


def _backend(x: Tensor, *others: Tensor):
    if takes_triton(x, *others):
        from megahybrid_kernels.norm import triton as backend
    else:
        backend = reference
    return backend


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, but x ends in {x.shape[-1]}")
