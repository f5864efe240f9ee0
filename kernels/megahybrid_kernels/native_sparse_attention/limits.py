"""What a selection always holds, and which blocks the kernels take."""

FORCED_BLOCKS = 3
"""The document's first block, the query's own and the one before it."""
BLOCK_SIZES = 16, 32, 64
"""Tokens of a block."""
