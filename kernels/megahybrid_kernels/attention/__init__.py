"""Causal softmax attention, full or over a sliding window, over packed sequences."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megahybrid_kernels.attention import reference
from megahybrid_kernels.attention.growing_cache import GrowingCache
from megahybrid_kernels.attention.key_value_cache import KeyValueCache
from megahybrid_kernels.backend import check_devices, takes_triton
from megahybrid_kernels.sequences import Sequences

_HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None
# Sequences that torch's flash attention takes at once: one dimension of its grid counts them.
_MOST_SEQUENCES = 65535
# Tokens from which on a plan of cuDNN's for one length pays.
_LONG = 16384

__all__ = ["GrowingCache", "KeyValueCache", "attention", "attention_with_cache", "unsupported"]


def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window_size: int | None = None) -> Tensor:
    """Causal grouped-query softmax attention (Ainslie et al., arXiv 2305.13245), each sequence on its own.

    Args:
        q: `[tokens, query_heads, head_dim]`.
        k, v: `[tokens, kv_heads, head_dim]`; query head n uses KV head `n // (query_heads // kv_heads)`.
        sequences: the borders of the packed sequences.
        window_size: keys that a query sees, itself included; None for all before it.

    Returns:
        `[tokens, query_heads, head_dim]` in q's dtype; logits are scaled by `head_dim ** -0.5`. On a GPU, where
        `unsupported` is None, this is torch's variable-length flash attention, otherwise blocks of
        scaled_dot_product_attention.

    Raises:
        ValueError: shapes do not fit, or `window_size` is below 1.
    """
    _check(q, k, v, sequences, window_size)
    if _takes_varlen(q):
        return _varlen(q, k, v, sequences, sequences, window_size)
    return reference.attention(q, k, v, sequences, window_size)


def attention_with_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KeyValueCache | GrowingCache,
    sequences: Sequences,
    window_size: int | None = None,
    in_place: bool = False,
) -> tuple[Tensor, KeyValueCache | GrowingCache]:
    """`attention` of new tokens to cached and new ones: prefill in pieces, and decode.

    Args:
        q, k, v, window_size: as for `attention`; the pieces may differ in length.
        cache: of the sequences' earlier tokens, a `KeyValueCache` with the same `window_size`, or without one a
            `GrowingCache`; `empty` at first.
        sequences: borders of the new tokens; `sequences.starts` says how many tokens of each the cache has seen.
        in_place: the op may overwrite `cache`, as it does on a GPU for one token of every sequence; a window's ring is
            not copied then.

    Returns:
        The new tokens' outputs as from `attention`, and a new cache; `cache` itself can be used as before, unless
        `in_place`.

    Raises:
        ValueError: shapes do not fit, or the cache was made for another window or number of sequences.
    """
    _check(q, k, v, sequences, window_size)
    count, slots = (cache.count, None) if isinstance(cache, GrowingCache) else cache.positions.shape
    if count != sequences.count:
        raise ValueError(f"the cache holds {count} sequences, but {sequences.count} were given")
    if slots != window_size:
        raise ValueError(f"the cache has {slots or 'growing'} slots, but the window is {window_size}")
    if in_place and sequences.tokens == count and takes_triton(q) and _overwritable(cache):
        return _step(q, k, v, cache, sequences.positions)
    if _takes_varlen(q) and not torch.is_grad_enabled():
        return _pieces(q, k, v, cache, sequences, window_size)
    if window_size is None:
        return reference.attention_with_growing_cache(q, k, v, cache, sequences)
    return reference.attention_with_window_cache(q, k, v, cache, sequences, window_size)


def unsupported(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why torch's flash attention does not take whole sequences of such heads; None where it does."""
    if not _HAS_VARLEN:
        return f"are not in torch {torch.__version__}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"take head dims up to 256 that are multiples of 8, not {head_dim}"
    return None


def _overwritable(cache: KeyValueCache | GrowingCache) -> bool:
    dense = isinstance(cache, GrowingCache) or all(x.is_contiguous() for x in (cache.k, cache.v))
    return dense and not torch.is_grad_enabled()


def _takes_varlen(q: Tensor) -> bool:
    return q.is_cuda and unsupported(q.dtype, q.shape[2]) is None


def _varlen(q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences, window_size: int | None) -> Tensor:
    """A sequence's last query sees its last key, the one before all but the last, and so on."""
    # Borders a sequence: two where blanks of a ring count as one of their own.
    each = (len(queries.cu_seqlens) - 1) // queries.count
    if each * queries.count > _MOST_SEQUENCES:
        parts = []
        for first in range(0, queries.count, _MOST_SEQUENCES // each):
            part = slice(first, first + _MOST_SEQUENCES // each)
            own, rows = _part(queries, part, each)
            others, columns = _part(keys, part, each)
            parts.append(_varlen(q[rows], k[columns], v[columns], own, others, window_size))
        return torch.cat(parts)
    # torch 2.11 has no grouped queries here, 2.14 asks for a flag that 2.11 does not know: repeat for both.
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    left = -1 if window_size is None else window_size - 1
    longest = (max(queries.lengths), max(keys.lengths))
    return varlen_attn(q, k, v, queries.cu_seqlens, keys.cu_seqlens, *longest, window_size=(left, 0))


def varlen_attn(*arguments, **options) -> Tensor:
    """torch's, whose import takes a second and imports Triton: it waits for the first call."""
    from torch.nn.attention.varlen import varlen_attn as of_torch

    return of_torch(*arguments, **options)


def _part(sequences: Sequences, part: slice, each: int) -> tuple[Sequences, slice]:
    """Some of the sequences, of `each` borders a sequence, and their rows."""
    lengths = sequences.lengths[part]
    first = sequences.borders[part.start]
    borders = sequences.cu_seqlens[each * part.start : each * (part.start + len(lengths)) + 1] - first
    return Sequences(borders, lengths), slice(first, first + sum(lengths))


def _pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KeyValueCache | GrowingCache,
    sequences: Sequences,
    window_size: int | None,
) -> tuple[Tensor, KeyValueCache | GrowingCache]:
    """By flash attention to the new tokens alone where all sequences begin here, else to what the cache holds, too."""
    if isinstance(cache, GrowingCache):
        new = cache.append(k, v, sequences)
        if cache.slots == 0:
            return _whole(q, k, v, sequences), new
        keys = Sequences.of(new.lengths, q.device)
        return _varlen(q, new.packed(new.room.k), new.packed(new.room.v), sequences, keys, None), new
    from megahybrid_kernels.attention.ring_pieces import attention_to_ring

    return attention_to_ring(_varlen, q, k, v, cache, sequences, window_size)


def _whole(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Causal attention of sequences that begin here, without gradients. Long ones of one length go to cuDNN, which is
    up to 1.5 times as fast as flash attention on an H100 but plans anew for each length."""
    length = sequences.lengths[0]
    if length < _LONG or len(set(sequences.lengths)) > 1 or q.shape[2] > 128:
        return _varlen(q, k, v, sequences, sequences, None)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    heads_first = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        o = F.scaled_dot_product_attention(*heads_first, is_causal=True)
    return o.transpose(1, 2).reshape(q.shape)


def _step(
    q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache | GrowingCache, positions: Tensor
) -> tuple[Tensor, KeyValueCache | GrowingCache]:
    from megahybrid_kernels.attention.triton_decode import attention_step

    if isinstance(cache, GrowingCache):
        cache = cache.with_room(cache.slots + 1)
        return attention_step(q, k, v, cache.room.k, cache.room.v, positions), cache.after(1)
    o = attention_step(q, k, v, cache.k, cache.v, positions)
    cache.positions.scatter_(1, (positions % cache.k.shape[2])[:, None], positions[:, None])
    return o, cache


def _check(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window_size: int | None) -> None:
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    if q.shape[0] != sequences.tokens:
        raise ValueError(f"q has {q.shape[0]} tokens, but the sequences have {sequences.tokens}")
    check_devices(q, k, v, sequences.cu_seqlens)
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size counts the query itself and must be at least 1, but is {window_size}")
