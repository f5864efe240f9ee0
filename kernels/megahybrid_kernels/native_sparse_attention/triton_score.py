"""The compressed branch, and the blocks that it chooses for the selected one.

`compress` attends to the pooled keys with an online softmax. `score` computes the same logits again and sums the
probabilities over the heads of a group; a chunk of query tiles at a time, so that memory stays linear in the tokens.
`top` goes over a token's scores twice: in a running list it finds the least score that is still taken, then it takes
what is better, and of what is equal the first. So the result depends on no tiling, and comes in ascending order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.heads import row_strides
from megahybrid_kernels.integers import cdiv, next_power_of_2
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.native_sparse_attention.limits import FORCED_BLOCKS
from megahybrid_kernels.native_sparse_attention.triton_plan import Shape, tiles_of
from megahybrid_kernels.online_softmax import softmax_step
from megahybrid_kernels.rows import load_all_rows, load_rows, packed_rows, store_rows
from megahybrid_kernels.sequences import Sequences

# Scores that are held at once: 128 MiB, or so many of each token and head where that is more.
_SCORES, _SCORES_EACH = 2**25, 64


@triton.jit
def query_rows(
    i0, end, first_row, end_row, head, heads, GROUPS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr
):
    """Of each row of the tile at i0: token, row number in `[.., query_heads, ..]` of the tokens from `first_row` on,
    query head, and whether they exist."""
    token, member, inside = packed_rows(i0, tl.minimum(end, end_row), 0, TOKENS * HEADS, HEADS)
    inside = inside & (token >= first_row) & (member < GROUPS)
    query_head = head * GROUPS + member
    return token, (token - first_row).to(tl.int64) * (heads * GROUPS) + query_head, query_head, inside


@triton.jit
def load_queries(
    q, token, first_row, query_head, inside, stride, head_stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """A tile of q, whose first row is that of token `first_row`."""
    row = (token - first_row).to(tl.int64) * stride + query_head.to(tl.int64) * head_stride
    return load_rows(q, row, inside, 1, 0, HEAD_DIM, WIDTH)


@triton.jit
def _compress_step(
    acc, total, peak, q, k, v, visible, scale, MASKED: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """`softmax_step`; without VALUES of the sum of weights alone."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    if VALUES:
        return softmax_step(acc, total, peak, logits, v, scale, PRECISION)
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)
    total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(logits * scale - new_peak[:, None]), 1)
    return acc, total, new_peak


@kernel
def compress_kernel(
    q, pooled_k, pooled_v, o, lse, firsts, begins, ends, before, q_stride, q_head_stride,
    first_tile, first_row, end_row, heads, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale q pooled_k^T) pooled_v over the complete blocks that a row sees, and log2 of the denominator.

    q, o and lse hold the tokens from `first_row` to before `end_row`. o is contiguous, 0 where a row sees nothing, and
    not written without VALUES; lse is fp32 `[.., query_heads]`. A document's last tiles see the most, and go first.
    """
    tile = first_tile + (tl.num_programs(0) - 1 - tl.program_id(0)) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    i0 = tl.load(firsts + tile)
    begin, end = tl.load(begins + i0), tl.load(ends + i0)
    token, row, query_head, inside = query_rows(i0, end, first_row, end_row, head, heads, GROUPS, HEADS, TOKENS)
    q_tile = load_queries(q, token, first_row, query_head, inside, q_stride, q_head_stride, HEAD_DIM, WIDTH)
    place = (tl.load(before + i0).to(tl.int64) * heads + head) * HEAD_DIM
    pooled_k += place
    pooled_v += place
    stride = heads * HEAD_DIM

    acc = tl.zeros([TOKENS * HEADS, WIDTH], tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    # Finite, so that a row that has seen nothing yet does not turn into NaN.
    peak = tl.full([TOKENS * HEADS], -1e30, tl.float32)
    # All rows see the blocks before their own; their own is complete for its last token alone.
    inner = (i0 - begin) // BLOCK // KEYS * KEYS
    for n0 in tl.range(0, inner, KEYS):
        n = n0 + tl.arange(0, KEYS)
        k_tile = load_all_rows(pooled_k, n, stride, HEAD_DIM, WIDTH)
        v_tile = k_tile
        if VALUES:
            v_tile = load_all_rows(pooled_v, n, stride, HEAD_DIM, WIDTH)
        acc, total, peak = _compress_step(
            acc, total, peak, q_tile, k_tile, v_tile, inside[:, None], scale, False, VALUES, PRECISION
        )  # fmt: skip
    count = (tl.minimum(i0 + TOKENS, end) - begin) // BLOCK
    # A loop, since the compiler makes products that are outside of one wait for each other, and then all do.
    for n0 in tl.range(inner, count, KEYS):
        n = n0 + tl.arange(0, KEYS)
        k_tile = load_rows(pooled_k, n.to(tl.int64), n < count, stride, 0, HEAD_DIM, WIDTH)
        v_tile = k_tile
        if VALUES:
            v_tile = load_rows(pooled_v, n.to(tl.int64), n < count, stride, 0, HEAD_DIM, WIDTH)
        visible = n[None, :] < ((token + 1 - begin) // BLOCK)[:, None]
        acc, total, peak = _compress_step(
            acc, total, peak, q_tile, k_tile, v_tile, visible, scale, True, VALUES, PRECISION
        )  # fmt: skip

    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(lse + row, tl.where(some, peak + tl.log2(total), float("inf")), mask=inside)
    if VALUES:
        store_rows(o, acc / total[:, None], row, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH)


@kernel
def score_kernel(
    q, pooled_k, lse, scores, firsts, begins, ends, before, q_stride, q_head_stride,
    first_tile, first_row, end_row, heads, pitch, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, NUM_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 scores `[tiles, TOKENS, heads, pitch]` of the tiles from `first_tile` on, of the blocks that end before the
    previous one; not of tokens that select all."""
    number = (tl.num_programs(0) - 1 - tl.program_id(0)) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    i0 = tl.load(firsts + first_tile + number)
    begin, end = tl.load(begins + i0), tl.load(ends + i0)
    current = (i0 - begin) // BLOCK
    if current >= NUM_BLOCKS:
        token, row, query_head, inside = query_rows(i0, end, first_row, end_row, head, heads, GROUPS, HEADS, TOKENS)
        q_tile = load_queries(q, token, first_row, query_head, inside, q_stride, q_head_stride, HEAD_DIM, WIDTH)
        # Rows that do not exist add nothing.
        row_lse = tl.load(lse + row, mask=inside, other=float("inf"))
        pooled_k += (tl.load(before + i0).to(tl.int64) * heads + head) * HEAD_DIM
        places = (number.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)) * heads + head
        for n0 in tl.range(0, current - 1, KEYS):
            n = n0 + tl.arange(0, KEYS)
            free = n < current - 1
            k_tile = load_rows(pooled_k, n.to(tl.int64), free, heads * HEAD_DIM, 0, HEAD_DIM, WIDTH)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            p = tl.exp2(logits * scale - row_lse[:, None])
            score = tl.sum(tl.reshape(p, [TOKENS, HEADS, KEYS]), 1)
            tl.store(scores + places[:, None] * pitch + n[None, :], score, mask=free[None, :])


@triton.jit
def _scores(scores, row, pitch, n0, free_end, COLUMNS: tl.constexpr):
    """COLUMNS blocks, the scores of each row as integers in the same order, NaN above all, -1 where not free; which."""
    n = n0 + tl.arange(0, COLUMNS)
    free = (n >= 1)[None, :] & (n[None, :] < free_end[:, None])
    score = tl.load(scores + row[:, None] * pitch + n[None, :], mask=free, other=0)
    return n, tl.where(free, score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)


@kernel
def top_kernel(
    scores, selection, firsts, begins, ends, first_tile, tiles, first_row, end_row, heads, pitch,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, FREE: tl.constexpr, LIST: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """selection int32 `[.., heads, NUM_BLOCKS]` of the tokens from `first_row` on, for ROWS rows of `score_kernel`'s.

    FREE of NUM_BLOCKS are not forced. Documents whose tokens all select everything have no scores.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = row // (heads * TOKENS)
    inside = tile < tiles
    i0 = tl.load(firsts + first_tile + tile, mask=inside, other=0)
    begin, end = tl.load(begins + i0), tl.load(ends + i0)
    token = i0 + row // heads % TOKENS
    inside = inside & (token < end) & (token >= first_row) & (token < end_row)
    current = (token - begin) // BLOCK
    scored = inside & (current >= NUM_BLOCKS)
    free_end = tl.where(scored, current - 1, 0)
    place = ((token - first_row).to(tl.int64) * heads + row % heads) * NUM_BLOCKS
    row = row.to(tl.int64)
    selection += place[:, None]

    if FREE > 0:
        most = tl.max(free_end, 0)
        best = tl.full([ROWS, LIST], -1, tl.int32)
        for n0 in tl.range(0, most, COLUMNS):
            _, score = _scores(scores, row, pitch, n0, free_end, COLUMNS)
            # An ascending and a descending list: the greater of each pair are the best, up and down.
            best = tl.bitonic_merge(tl.maximum(best, tl.topk(score, LIST)))
        rank = tl.arange(0, LIST)[None, :]
        least = tl.sum(tl.where(rank == LIST - FREE, best, 0), 1)
        equals = tl.sum(((rank >= LIST - FREE) & (best == least[:, None])).to(tl.int32), 1)
        taken, seen = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
        for n0 in tl.range(0, most, COLUMNS):
            n, score = _scores(scores, row, pitch, n0, free_end, COLUMNS)
            equal = ((score == least[:, None]) & scored[:, None]).to(tl.int32)
            first = seen[:, None] + tl.cumsum(equal, 1) <= equals[:, None]
            take = ((score > least[:, None]) & scored[:, None]) | ((equal > 0) & first)
            slot = taken[:, None] + tl.cumsum(take.to(tl.int32), 1)
            tl.store(selection + slot, tl.broadcast_to(n[None, :], [ROWS, COLUMNS]), mask=take)
            taken += tl.sum(take.to(tl.int32), 1)
            seen += tl.sum(equal, 1)
    slot = tl.arange(0, SLOTS)[None, :]
    number = tl.where(slot < FREE + 1, 0, current[:, None] + (slot - NUM_BLOCKS + 1))
    everything = tl.where(slot <= current[:, None], slot, -1)
    forced = (slot == 0) | (slot > FREE)
    mask = inside[:, None] & (slot < NUM_BLOCKS) & (forced | (scored == 0)[:, None])
    tl.store(selection + slot, tl.where(scored[:, None], number, everything), mask=mask)


def compress(
    shape: Shape, q: Tensor, pooled_k: Tensor, pooled_v: Tensor | None, sequences: Sequences, rows: tuple[int, int]
) -> tuple[Tensor | None, Tensor]:
    """The compressed branch and its lse, of the tokens `rows` = (first, end) that q holds; o only with `pooled_v`."""
    tiles, first_tile, count = tiles_of(sequences, shape.tile_tokens(shape.tune.score_rows), rows)
    launch = shape.tune.compress
    o = None if pooled_v is None else torch.empty(*q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(*q.shape[:2], dtype=torch.float32, device=q.device)
    compress_kernel[count * shape.kv_heads](
        q, pooled_k, pooled_k if pooled_v is None else pooled_v, q if o is None else o, lse, tiles.firsts,
        sequences.begins, sequences.ends, sequences.tiles(shape.block_size).before, *row_strides(q),
        first_tile, *rows, shape.kv_heads, shape.log2_scale,
        **shape.constants(q.dtype), TOKENS=tiles.size, BLOCK=shape.block_size, KEYS=launch.size,
        VALUES=o is not None, **launch.options(),
    )  # fmt: skip
    return o, lse


def select(
    shape: Shape, q: Tensor, pooled_k: Tensor, lse: Tensor | None, sequences: Sequences, rows: tuple[int, int]
) -> Tensor:
    """The selection of the tokens `rows` that q and lse hold; lse, of `compress`, matters only if `needs_scores`."""
    tiles, first_tile, count = tiles_of(sequences, shape.tile_tokens(shape.tune.score_rows), rows)
    heads, free, launch, top = shape.kv_heads, shape.num_blocks - FORCED_BLOCKS, shape.tune.score, shape.tune.top
    selection = torch.empty(len(q), heads, shape.num_blocks, dtype=torch.int32, device=q.device)
    scored = needs_scores(shape, sequences)
    size, pitch = tiles.size, cdiv(max(sequences.lengths), 16 * shape.block_size) * 16 if scored else 0
    held = max(_SCORES, _SCORES_EACH * shape.tokens * heads)
    # Rows of scores have numbers of 32 bits.
    chunk = min(count, max(1, min(held // max(pitch, 1), 2**30) // (size * heads)))
    scores = torch.empty(chunk * size * heads * pitch, dtype=torch.float32, device=q.device)
    borders = (tiles.firsts, sequences.begins, sequences.ends)
    numbers = {"TOKENS": size, "BLOCK": shape.block_size, "NUM_BLOCKS": shape.num_blocks}
    longest = max(2, next_power_of_2(max(free, 1)))
    for first in range(first_tile, first_tile + count, chunk):
        some = min(chunk, first_tile + count - first)
        if scored:
            score_kernel[some * heads](
                q, pooled_k, lse, scores, *borders, sequences.tiles(shape.block_size).before, *row_strides(q),
                first, *rows, heads, pitch, shape.log2_scale,
                **shape.constants(q.dtype), **numbers, KEYS=launch.size, **launch.options(),
            )  # fmt: skip
        top_kernel[cdiv(some * size * heads, top.size)](
            scores, selection, *borders, first, some, *rows, heads, pitch, **numbers,
            FREE=free, LIST=longest, SLOTS=next_power_of_2(shape.num_blocks), ROWS=top.size,
            COLUMNS=max(shape.tune.columns, longest), **top.options(),
        )  # fmt: skip
    return selection


def needs_scores(shape: Shape, sequences: Sequences) -> bool:
    """Whether some token does not select all blocks."""
    return max(sequences.lengths) > shape.num_blocks * shape.block_size and shape.num_blocks > FORCED_BLOCKS
