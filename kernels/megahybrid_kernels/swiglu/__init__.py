"""The product at the heart of a SwiGLU feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from megahybrid_kernels.backend import takes_triton
from megahybrid_kernels.swiglu import reference

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element (Shazeer, arXiv 2002.05202, equation 5, between its projections).

    Args:
        gate, up: of one shape, any number of dimensions.

    Returns that shape in up's dtype; arithmetic is in at least float32. Both are differentiable.

    Raises:
        ValueError: the shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate is {tuple(gate.shape)}, but up is {tuple(up.shape)}")
    if takes_triton(gate, up) and takes_triton(up):
        from megahybrid_kernels.swiglu import triton as backend
    else:
        backend = reference
    return backend.swiglu(gate, up)
