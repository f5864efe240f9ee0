"""What a query selects, and which blocks the kernels take."""

FORCED_BLOCKS = 3
"""The document's first block, the query's own and the one before it: every query selects them."""
MOST_BLOCKS = 64
"""A query selects: kernels sort and compile for as many."""
BLOCK_SIZES = 16, 32, 64
"""Tokens of a block."""
