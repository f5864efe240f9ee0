"""Native sparse attention of many new tokens to a cache and each other, by the kernels of training.

A sequence that has begun is a document of all its tokens, of which the new ones alone have queries: its keys, values
and means are read from the cache. Sequences that begin here are packed documents as in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.native_sparse_attention import triton
from megahybrid_kernels.native_sparse_attention.cache import NSACache
from megahybrid_kernels.native_sparse_attention.triton_plan import Shape
from megahybrid_kernels.native_sparse_attention.triton_pool import pool
from megahybrid_kernels.sequences import Sequences


def native_sparse_attention_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cache: NSACache,
    sequences: Sequences,
    block_size: int,
    num_blocks: int,
    window_size: int,
    queries: Tensor | None = None,
) -> tuple[Tensor, NSACache]:
    """`native_sparse_attention_with_cache` without gradients and without waiting for the GPU; likewise."""
    q, k, v, queries = (x if x is None else dense_rows(x) for x in (q, k, v, queries))
    sizes = block_size, num_blocks
    if cache.slots == 0:
        pooled = pool(k, sequences, block_size), pool(v, sequences, block_size)
        rows, selection = (0, sequences.tokens), None
        if queries is not None:
            selection = triton.select_rows(Shape.of(queries, k, *sizes), queries, pooled[0], sequences, rows)
        shape, one_length = Shape.of(q, k, *sizes), len(set(sequences.lengths)) == 1
        o, *_ = triton.attend_rows(shape, q, k, v, gates, *pooled, sequences, window_size, selection, False, rows)
        return o, cache.append(k, v, sequences, pooled if one_length else None)
    new = cache.append(k, v, sequences)
    gates, parts = gates.contiguous(), []
    for n, (start, end) in enumerate(zip(cache.lengths, new.lengths, strict=True)):
        document, rows = sequences.document(end), (start, end)
        pairs = zip(new.room.rows, new.room.spans, strict=True)
        keys, values, *means = (x[n, :, : end // span].transpose(0, 1) for x, span in pairs)
        means = [x.contiguous() for x in means]
        own, selection = slice(*sequences.borders[n : n + 2]), None
        if queries is not None:
            shape = Shape.of(queries, keys, *sizes)
            selection = triton.select_rows(shape, queries[own], means[0], document, rows)
        shape = Shape.of(q, keys, *sizes)
        inputs = (q[own], keys, values, gates[own], *means)
        parts.append(triton.attend_rows(shape, *inputs, document, window_size, selection, False, rows)[0])
    return torch.cat(parts), new
