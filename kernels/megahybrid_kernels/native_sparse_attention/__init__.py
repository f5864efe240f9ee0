"""Native sparse attention (NSA): every query attends to means of blocks, to the best blocks, and to a window."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.backend import check_devices, takes_triton, unsupported_head_dims
from megahybrid_kernels.native_sparse_attention import reference
from megahybrid_kernels.native_sparse_attention.cache import NSACache
from megahybrid_kernels.native_sparse_attention.limits import BLOCK_SIZES, FORCED_BLOCKS, MOST_BLOCKS
from megahybrid_kernels.sequences import Sequences

__all__ = ["NSACache", "native_sparse_attention", "native_sparse_attention_with_cache", "select_blocks", "unsupported"]


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    sequences: Sequences,
    block_size: int,
    num_blocks: int,
    window_size: int,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention in three branches, each with a softmax of its own, over keys and values that they share.

    Yuan et al. (arXiv 2502.11089), as He & Garner (arXiv 2510.20787) use it: blocks do not overlap, and each is
    compressed to its mean. With positions t counted in each document, and B = `block_size`, a query at t sees

    - compressed: the means of keys and of values of each complete block n, `n < (t + 1) // B`; the branch is 0 where
      there is none. Means are summed in at least fp32 and rounded to k's dtype;
    - selected: the tokens up to t of the blocks that `select_blocks` chooses for it;
    - window: the last `window_size` tokens, itself included.

    Args:
        q: `[tokens, query_heads, head_dim]`, rotated.
        k, v: `[tokens, kv_heads, head_dim]`, k rotated; query head n uses KV head `n // (query_heads // kv_heads)`.
        gates: `[tokens, query_heads, 3]`, factors of the compressed, the selected and the window branch, none negative.
        sequences: borders of the packed documents; blocks begin where a document does.
        block_size: tokens of a block.
        num_blocks: blocks that a query selects, the forced ones included, at most `limits.MOST_BLOCKS`.
        window_size: keys that a query's window holds.
        selection: what `select_blocks` returned, in place of choosing here. Another must be of the same form, and hold
            each query's own block and the one before.

    Returns:
        `[tokens, query_heads, head_dim]` in q's dtype, and the selection. Logits are scaled by `head_dim ** -0.5`.
        Gradients reach q, k, v and gates; the selection is constant.

    Raises:
        ValueError: shapes or devices do not fit, `block_size` or `window_size` is below 1, or `num_blocks` is none that
            a query can select. On a CPU also: a gate is negative, or a selection is not such; on a GPU, where looking
            would wait for it, their gradients are NaN.
    """
    _check(q, k, sequences, block_size, num_blocks, (0, sequences.tokens))
    _check_shapes(q, k, v, gates, window_size)
    if selection is not None and (selection.dtype, selection.shape) != (torch.int32, (*k.shape[:2], num_blocks)):
        expected = f"int32 {[*k.shape[:2], num_blocks]}"
        raise ValueError(f"a selection is {expected}, not {selection.dtype} {list(selection.shape)}")
    check_devices(q, v, gates, selection)
    if _takes_triton(q, k, sequences, block_size):
        from megahybrid_kernels.native_sparse_attention import triton as backend
    else:
        backend = reference
        if gates.device.type == "cpu":
            _check_values(gates, selection, sequences, block_size)
    return backend.native_sparse_attention(q, k, v, gates, sequences, block_size, num_blocks, window_size, selection)


def select_blocks(
    q: Tensor,
    k: Tensor,
    sequences: Sequences,
    block_size: int,
    num_blocks: int,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """The blocks of keys whose tokens each query attends to, the same for all query heads of a KV head.

    A query in block c takes those of the blocks 0, c - 1 and c that exist, and the best of the blocks 1 to c - 2, until
    it has `num_blocks` or all. A block's score is its probability in the compressed branch of
    `native_sparse_attention`, summed over the query heads in at least fp32; of two equal blocks the earlier is better.

    Args:
        q, k, sequences, block_size, num_blocks: as for `native_sparse_attention`.
        rows: (first, end) of the tokens whose queries q holds, alone; all without.

    Returns:
        int32 `[tokens of q, kv_heads, num_blocks]`: numbers of blocks within the document, ascending, then -1. There is
        no gradient.

    Raises:
        ValueError: as `native_sparse_attention`, or the rows are not among the tokens.
    """
    rows = rows or (0, sequences.tokens)
    _check(q, k, sequences, block_size, num_blocks, rows)
    if _takes_triton(q, k, sequences, block_size):
        from megahybrid_kernels.native_sparse_attention import triton as backend
    else:
        backend = reference
    return backend.select_blocks(q, k, sequences, block_size, num_blocks, rows)


def native_sparse_attention_with_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cache: NSACache,
    sequences: Sequences,
    block_size: int,
    num_blocks: int,
    window_size: int,
    in_place: bool = False,
    queries: Tensor | None = None,
) -> tuple[Tensor, NSACache]:
    """`native_sparse_attention` of new tokens to cached and new ones: prefill in pieces, and decode.

    Every query sees exactly what `native_sparse_attention` shows it, in whatever pieces the tokens come.

    Args:
        q, k, v, gates, num_blocks, window_size: as for `native_sparse_attention`; the pieces may differ in length.
        cache: of the sequences' earlier tokens, `NSACache.empty` at first.
        sequences: borders of the new tokens; `sequences.starts` are the cache's lengths, or None where it is empty.
        block_size: the cache's.
        in_place: the op may overwrite `cache`, as it does on a GPU for one token of every sequence.
        queries: `[tokens, heads, head_dim]`, from which blocks are selected where q has some alone of the query heads
            that share these KV heads; q without.

    Returns:
        The new tokens' outputs as from `native_sparse_attention`, and a new cache; `cache` itself can be used as
        before, unless `in_place`.

    Raises:
        ValueError: as `native_sparse_attention`, or the cache was made for another block size or number of sequences.
    """
    for each in (q,) if queries is None else (q, queries):
        _check(each, k, sequences, block_size, num_blocks, (0, sequences.tokens))
    _check_shapes(q, k, v, gates, window_size)
    if (cache.count, cache.block_size) != (sequences.count, block_size):
        raise ValueError(
            f"the cache holds {cache.count} sequences in blocks of {cache.block_size}, but {sequences.count} in blocks "
            f"of {block_size} were given"
        )
    check_devices(q, v, gates, cache.room.k)
    takes = _takes_triton(q, k, sequences, block_size) and not torch.is_grad_enabled()
    if takes and in_place and sequences.tokens == cache.count:
        from megahybrid_kernels.native_sparse_attention.triton_decode import native_sparse_attention_step

        cache = cache.with_room(cache.slots + 1)
        sizes = (num_blocks, window_size)
        o = native_sparse_attention_step(q, k, v, gates, cache, sequences.positions, *sizes, queries)
        return o, cache.after(1)
    if takes:
        from megahybrid_kernels.native_sparse_attention.triton_prefill import native_sparse_attention_piece as backend
    else:
        backend = reference.native_sparse_attention_with_cache
    return backend(q, k, v, gates, cache, sequences, block_size, num_blocks, window_size, queries)


def unsupported(dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why the kernels do not take such heads in such blocks, q in `dtype`; None where they do."""
    if block_size not in BLOCK_SIZES:
        return f"take blocks of {', '.join(map(str, BLOCK_SIZES))} tokens, not {block_size}"
    return unsupported_head_dims(dtype, head_dim)


def _takes_triton(q: Tensor, k: Tensor, sequences: Sequences, block_size: int) -> bool:
    return takes_triton(q, k, sequences.cu_seqlens) and unsupported(q.dtype, q.shape[2], block_size) is None


def _check(q: Tensor, k: Tensor, sequences: Sequences, block_size: int, num_blocks: int, rows: tuple[int, int]) -> None:
    if q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} do not fit together")
    if k.shape[0] != sequences.tokens:
        raise ValueError(f"k has {k.shape[0]} tokens, but the sequences have {sequences.tokens}")
    if not 0 <= rows[0] < rows[1] <= sequences.tokens or q.shape[0] != rows[1] - rows[0]:
        raise ValueError(f"q has {q.shape[0]} tokens, but should have rows {rows[0]} to {rows[1]} of {k.shape[0]}")
    if block_size < 1 or not FORCED_BLOCKS <= num_blocks <= MOST_BLOCKS:
        raise ValueError(
            f"block_size {block_size} must be at least 1, and num_blocks {num_blocks} from the {FORCED_BLOCKS} forced "
            f"blocks to {MOST_BLOCKS}"
        )
    check_devices(q, k, sequences.cu_seqlens)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, window_size: int) -> None:
    if v.shape != k.shape or gates.shape != (*q.shape[:2], 3):
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, gates))
        raise ValueError(f"q, k, v and gates do not fit together: {shapes}")
    if window_size < 1:
        raise ValueError(f"window_size counts the query itself and must be at least 1, but is {window_size}")


def _check_values(gates: Tensor, selection: Tensor | None, sequences: Sequences, block_size: int) -> None:
    if (gates < 0).any():
        raise ValueError("gates weigh the branches: none may be negative")
    if selection is None:
        return
    current, blank = (sequences.offsets // block_size)[:, None, None], torch.iinfo(selection.dtype).max
    numbers = torch.where(selection < 0, blank, selection)
    ascending = (numbers.diff(dim=2) > 0) | (numbers[..., 1:] == blank)
    own, before = selection.amax(2, keepdim=True) == current, (selection == (current - 1).clamp(min=0)).any(2)
    if not (ascending.all() and own.all() and before.all()):
        raise ValueError(
            "a selection has ascending numbers of blocks and then -1, and each query's own block and the one before"
        )
