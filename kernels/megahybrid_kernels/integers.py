"""Integer arithmetic of launches. Triton's own functions also serve inside kernels, which costs ten times as long."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; n is positive."""
    return 1 << (n - 1).bit_length()
