"""Ops of hybrid linear + sparse attention models over packed sequences, in PyTorch and Triton."""

from megahybrid_kernels.sequences import Sequences

__all__ = ["Sequences"]
