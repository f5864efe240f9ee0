"""When learnable token eviction's capped buffer drops each token."""

from __future__ import annotations

from torch import Tensor

from megahybrid_kernels.backend import takes_triton
from megahybrid_kernels.exit_positions import reference
from megahybrid_kernels.exit_positions.reference import NEVER, exits_of_candidates
from megahybrid_kernels.sequences import Sequences

__all__ = ["NEVER", "exit_positions", "exits_of_candidates"]


def exit_positions(score: Tensor, sequences: Sequences, window_size: int, sink_size: int, buffer_size: int) -> Tensor:
    """Position of the first query that no longer finds each token in a buffer of `buffer_size` tokens a head.

    He & Garner (arXiv 2510.20787) evict token by token; this is the same in closed form. Candidates, the sinks and the
    tokens of positive score, are ordered by (sink first, higher score, earlier position). A candidate j arrives at
    query `j + window_size + 1`, and leaves, or is turned away, when the `buffer_size`-th one that outranks it arrives.

    Args:
        score: `[tokens, heads]`, retention scores; no gradient flows through this op.
        sequences: borders of the packed documents; each has its own buffer.
        window_size: w; a query sees the w keys before it besides itself.
        sink_size: the first tokens of a document that are always kept; they take up slots of the buffer.
        buffer_size: slots a head.

    Returns:
        int64 `[tokens, heads]`: query i sees a candidate j beyond its window iff `i < exit`. NEVER for those that stay,
        0 for tokens that are no candidates; at most `j + window_size + 1` for those that are never admitted.

    Raises:
        ValueError: `buffer_size` is below 1 or below `sink_size`, or the shapes do not fit.
    """
    if buffer_size < max(1, sink_size):
        raise ValueError(f"buffer_size must hold the {sink_size} sinks and at least one token, but is {buffer_size}")
    if score.dim() != 2 or score.shape[0] != sequences.tokens:
        raise ValueError(f"score is {list(score.shape)}, but the sequences have {sequences.tokens} tokens")
    if takes_triton(score, sequences.cu_seqlens):
        from megahybrid_kernels.exit_positions import triton as backend
    else:
        backend = reference
    return backend.exit_positions(score, sequences, window_size, sink_size, buffer_size)
