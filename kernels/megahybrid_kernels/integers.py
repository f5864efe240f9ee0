"""Integer arithmetic of launches. Triton's own functions also serve inside kernels, which costs ten times as long."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; n is positive."""
    return 1 << (n - 1).bit_length()


def tile_width(size: int) -> int:
    """Columns of a tile that holds `size`: a power of two, and at least what `tl.dot` takes."""
    return max(16, next_power_of_2(size))
