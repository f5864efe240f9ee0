"""Prefix sums along the tokens of each head, for Triton kernels that compact tokens into lists.

One kernel stores the sum of every block of BLOCK tokens, `[heads, blocks]`; the next calls `exclusive_prefix` in
programs of the same blocks. Each adds up the blocks before its own by itself, so nothing waits for the host and no
launch is spent on the sums alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def exclusive_prefix(value, sums, block, BLOCK: tl.constexpr):
    """What stands before each value of block number `block`: int32 `[BLOCK]`; sums: int32, the head's block sums."""
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, block, BLOCK):
        other = first + tl.arange(0, BLOCK)
        before += tl.load(sums + other, mask=other < block, other=0)
    return tl.sum(before, 0) + tl.cumsum(value, 0) - value
