"""Tiles of rows that Triton kernels load and store.

Row numbers come in the width that the caller needs: 64 bits, unless 32 hold all offsets from the pointer.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(pointer, row, inside, stride, first, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """`[rows, WIDTH]` from column `first` of an array of `[.., DIM]`; zero where not inside and beyond DIM."""
    column = first + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if DIM % WIDTH != 0:
        mask = mask & (column < DIM)[None, :]
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0)


@triton.jit
def store_rows(pointer, x, row, inside, stride, first, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_rows`, in the array's dtype."""
    column = first + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if DIM % WIDTH != 0:
        mask = mask & (column < DIM)[None, :]
    places = pointer + row[:, None] * stride + column[None, :]
    tl.store(places, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_all_rows(pointer, rows, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """`load_rows` where all rows are inside."""
    column = tl.arange(0, WIDTH)
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + column[None, :]
    if WIDTH != HEAD_DIM:
        return tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0)
    return tl.load(pointers)


@triton.jit
def load_either(first, second, of_first, places, mask, CHOOSES: tl.constexpr):
    """Of `first` at `places` where `of_first`, which broadcasts to them, else of `second`; CHOOSES: a table's."""
    if CHOOSES:
        return tl.load(tl.where(of_first, first, second) + places, mask=mask, other=0)
    x = tl.load(first + places, mask=mask & of_first, other=0)
    y = tl.load(second + places, mask=mask & (of_first == 0), other=0)
    return tl.where(of_first, x, y)


@triton.jit
def packed_rows(first, tokens, group, ROWS: tl.constexpr, PACK: tl.constexpr):
    """Token and query head (within its KV head's group) of each row of a tile, and whether the token exists."""
    row = tl.arange(0, ROWS)
    token = first + row // PACK
    return token, group * PACK + row % PACK, token < tokens
