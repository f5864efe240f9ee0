"""Attention under learnable token eviction (LTE): an exact window, and beyond it what each head keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.backend import takes_triton, unsupported_head_dims
from megahybrid_kernels.lte_attention import reference
from megahybrid_kernels.lte_attention.cache import LTECache
from megahybrid_kernels.lte_attention.gate import Gate
from megahybrid_kernels.sequences import Sequences

__all__ = ["Gate", "LTECache", "lte_attention", "lte_attention_with_cache", "unsupported"]


def lte_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    sequences: Sequences,
    window_size: int,
    sink_size: int,
    buffer_size: int | None = None,
    gate: Gate = "value",
) -> Tensor:
    """Causal attention to a window, the sinks and the tokens that each KV head retains.

    He & Garner (arXiv 2510.20787), section 3 and equation 6. Query i of a document sees key j <= i iff
    `i - j <= window_size`, or `j < sink_size`, or `score_j > 0` and `i < exit_j` (see `exit_positions`).
    The mask has no gradient; instead the score receives that of a gate: of one on the value, which is 1,
    `d score_j = <dv_j, v_j>` (the paper's), or of one added to the logit, which is 0,
    `d score_j = sum_i p_ij <do_i, v_j - o_i>`; over all queries and query heads that see j, summed in at least fp32.
    The second adds up to 0 over what a query sees: what is worth as much as the rest pushes no score.
    "counterfactual" adds to the second, over all queries that do not see j, what the loss would change to first order
    if the query saw j, too: `<do_i, v_j - o_i>` times the p_ij that j would have. It takes the FLOPs of full
    attention's forward pass, beside the rest; in PyTorch, memory quadratic in the longest document, too.
    "displacing" is that, but for what only seems to be gained: where of a document n tokens with positive scores, but
    for sinks, leave the window, and the buffer has room for r < n beside the sinks, one comes in in another's place,
    and only their order matters. From the gradient of each of the n it takes `1 - r / n` of their mean.

    Args:
        q: `[tokens, query_heads, head_dim]`, rotated.
        k, v: `[tokens, kv_heads, head_dim]`, k rotated; query head n uses KV head `n // (query_heads // kv_heads)`.
        score: `[tokens, kv_heads]`, retention scores.
        sequences: borders of the packed documents.
        window_size: w; a query sees itself and the w keys before it.
        sink_size: the first tokens of a document that all see.
        buffer_size: at most so many keys, sinks included, beyond the window; None for no cap.
        gate: whose gradient the score gets, "value", "logit", "counterfactual" or "displacing".

    Returns:
        `[tokens, query_heads, head_dim]` in q's dtype; logits are scaled by `head_dim ** -0.5`.

    Raises:
        ValueError: shapes do not fit, `window_size` or `sink_size` is negative, or the buffer cannot hold the sinks.
    """
    _check(q, k, v, score, sequences, window_size, sink_size, buffer_size)
    if takes_triton(q, k, v, score, sequences.cu_seqlens) and unsupported(q.dtype, q.shape[2]) is None:
        from megahybrid_kernels.lte_attention import triton as backend
    else:
        backend = reference
    return backend.lte_attention(q, k, v, score, sequences, window_size, sink_size, buffer_size, gate)


def lte_attention_with_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    cache: LTECache | None,
    sequences: Sequences,
    window_size: int,
    sink_size: int,
    buffer_size: int,
    delay: int,
    in_place: bool = False,
) -> tuple[Tensor, LTECache]:
    """`lte_attention` with the cap, of new tokens to cached and new ones: prefill in pieces, and decode.

    Every query sees exactly what `lte_attention` shows it, in whatever pieces the tokens come. Gradients reach q, k and
    v, not the score.

    Args:
        q, k, v, window_size, sink_size, buffer_size: as for `lte_attention`.
        score: `[tokens, kv_heads]`, streamed: the row of position p holds the score of position `p - delay`, as
            `retention_scores_streamed` yields it; rows with `p < delay` are ignored.
        cache: of the sequences' earlier tokens; where all begin here it is not read, and None does.
        sequences: borders of the new tokens; `sequences.starts` says how many tokens of each the cache has seen, and
            None that all begin here.
        delay: tokens by which scores are late, the router's margin.
        in_place: the op may overwrite `cache`, as it does on a GPU for one token of every sequence, where nothing is
            copied then but the row that enters the buffer.

    Returns:
        The new tokens' outputs, and the cache after them; `cache` itself is left as it was unless `in_place`.

    Raises:
        ValueError: as `lte_attention`, or the cache has other sizes or is missing, or a token would leave the window
            before its score arrives (`window_size + 1 <= delay`).
    """
    _check(q, k, v, score, sequences, window_size, sink_size, buffer_size)
    if window_size + 1 <= delay:
        raise ValueError(f"a score comes {delay} tokens late: window_size + 1 must exceed it, but is {window_size + 1}")
    if cache is not None:
        _check_cache(cache, (sequences.count, k.shape[1], window_size + 1, buffer_size))
    elif sequences.starts is not None:
        raise ValueError("the sequences do not begin here, but there is no cache of their earlier tokens")
    takes = takes_triton(q, k, v, score, cache and cache.k, sequences.cu_seqlens) and not torch.is_grad_enabled()
    if takes and in_place and cache is not None and max(sequences.lengths) == 1 and _overwritable(cache):
        from megahybrid_kernels.lte_attention.triton_decode import lte_attention_step

        return lte_attention_step(q, k, v, score, cache, sequences.positions, sink_size, delay), cache
    if takes and unsupported(q.dtype, q.shape[2]) is None:
        from megahybrid_kernels.lte_attention.triton_prefill import lte_attention_piece as backend
    else:
        backend = reference.lte_attention_with_cache
        cache = cache or LTECache.empty(
            *(sequences.count, *k.shape[1:], window_size, buffer_size), dtype=k.dtype, device=k.device
        )
    return backend(q, k, v, score, cache, sequences, window_size, sink_size, buffer_size, delay)


def unsupported(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels do not take whole sequences of such heads, q in `dtype`; None where they do."""
    return unsupported_head_dims(dtype, head_dim)


def _overwritable(cache: LTECache) -> bool:
    return all(x.is_contiguous() for x in vars(cache).values())


def _check_cache(cache: LTECache, expected: tuple[int, ...]) -> None:
    actual = (*cache.k.shape[:3], cache.buffer_k.shape[2])
    if actual != expected:
        raise ValueError(f"the cache has (sequences, heads, window, buffer) {actual}, but {expected} are needed")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    sequences: Sequences,
    window_size: int,
    sink_size: int,
    buffer_size: int | None,
) -> None:
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1] or score.shape != k.shape[:2]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, score))
        raise ValueError(f"q, k, v and score do not fit together: {shapes}")
    if q.shape[0] != sequences.tokens:
        raise ValueError(f"q has {q.shape[0]} tokens, but the sequences have {sequences.tokens}")
    if window_size < 0 or sink_size < 0:
        raise ValueError(f"window_size {window_size} and sink_size {sink_size} must not be negative")
    if buffer_size is not None and buffer_size < max(1, sink_size):
        raise ValueError(f"buffer_size must hold the {sink_size} sinks and at least one token, but is {buffer_size}")
