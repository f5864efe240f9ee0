"""The selected and the window branch, and the gated sum of all three.

A program owns a tile of neighbouring tokens and all query heads of one KV head. Of the joint blocks of its tokens each
row's softmax takes those that its own token selected; then the window's keys follow, which all rows read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.heads import row_strides
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.native_sparse_attention.triton_plan import Shape, tiles_of
from megahybrid_kernels.native_sparse_attention.triton_score import load_queries, query_rows
from megahybrid_kernels.native_sparse_attention.triton_union import Union
from megahybrid_kernels.online_softmax import softmax_step, softmax_step_of_rows
from megahybrid_kernels.rows import load_all_rows, load_rows, store_rows
from megahybrid_kernels.sequences import Sequences


@triton.jit
def window_blocks(i0, begin, end, window, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of a tile's window: the first, the first that all rows see all of, and the tile's own, the last."""
    current = (i0 - begin) // BLOCK
    first = tl.maximum(i0 - window + 1 - begin, 0) // BLOCK
    last_row = tl.minimum(i0 + TOKENS, end) - 1
    inner = tl.maximum(last_row - window + 1 - begin + BLOCK - 1, 0) // BLOCK
    return first, tl.minimum(inner, current), current


@triton.jit
def edge_block(edge, first, inner, current):
    """Number `edge` of the window's blocks that need a mask: those before `inner`, then the tile's own."""
    return tl.where(edge < inner - first, first + edge, current)


@triton.jit
def _finish(acc, total, peak):
    """The branch's output and lse; 0 and +inf where a row saw nothing."""
    some = total > 0
    total = tl.where(some, total, 1.0)
    return acc / total[:, None], tl.where(some, peak + tl.log2(total), float("inf"))


@kernel
def attend_kernel(
    q, k, v, gates, blocks, members, counts, o_compressed, o, o_selected, o_window, lse_selected, lse_window,
    firsts, begins, ends, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    first_tile, first_row, end_row, heads, window, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = gates[0] o_compressed + gates[1] o_selected + gates[2] o_window, `[tokens, query_heads, HEAD_DIM]` each.

    All but k and v hold the tokens from `first_row` to before `end_row`. Gates and outputs are contiguous; a tile has
    at most CAPACITY joint blocks.
    o_selected, o_window and their lse are written only if SAVE.
    """
    ROWS: tl.constexpr = TOKENS * HEADS
    tile, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i0 = tl.load(firsts + first_tile + tile)
    begin, end = tl.load(begins + i0), tl.load(ends + i0)
    token, row, query_head, inside = query_rows(i0, end, first_row, end_row, head, heads, GROUPS, HEADS, TOKENS)
    q_tile = load_queries(q, token, first_row, query_head, inside, q_stride, q_head_stride, HEAD_DIM, WIDTH)
    k += begin.to(tl.int64) * k_stride + head * k_head_stride
    v += begin.to(tl.int64) * v_stride + head * v_head_stride
    first, inner, current = window_blocks(i0, begin, end, window, TOKENS, BLOCK)
    lane = tl.arange(0, BLOCK)
    member = token - i0

    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # Finite, so that a row that has seen nothing yet does not turn into NaN.
    peak = tl.full([ROWS], -1e30, tl.float32)
    blocks += tl.program_id(0).to(tl.int64) * CAPACITY
    members += tl.program_id(0).to(tl.int64) * CAPACITY
    count = tl.load(counts + tl.program_id(0))
    # The tile's own block, where it is among them, is the last, and the only one that reaches beyond a row.
    whole = count - (tl.load(blocks + count - 1, mask=count > 0, other=-1) == current).to(tl.int32)
    block = tl.load(blocks, mask=whole > 0, other=0)
    for e in tl.range(0, whole):
        seen = ((tl.load(members + e) >> member) & 1) > 0
        k_tile = load_all_rows(k + tl.cast(block, tl.int64) * BLOCK * k_stride, lane, k_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(v + tl.cast(block, tl.int64) * BLOCK * v_stride, lane, v_stride, HEAD_DIM, WIDTH)
        # A turn ahead, so that the loads of a block do not wait for its number.
        block = tl.load(blocks + e + 1, mask=e + 1 < whole, other=0)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        acc, total, peak = softmax_step_of_rows(acc, total, peak, logits, v_tile, seen, scale, PRECISION)
    # A loop, since the compiler makes products that are outside of one wait for each other, and then all do.
    for e in tl.range(whole, count):
        j = current * BLOCK + lane
        k_tile = load_rows(k, j.to(tl.int64), begin + j < end, k_stride, 0, HEAD_DIM, WIDTH)
        v_tile = load_rows(v, j.to(tl.int64), begin + j < end, v_stride, 0, HEAD_DIM, WIDTH)
        seen = ((tl.load(members + e) >> member) & 1) > 0
        visible = seen[:, None] & (begin + j[None, :] <= token[:, None])
        logits = tl.where(visible, tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), float("-inf"))
        acc, total, peak = softmax_step(acc, total, peak, logits, v_tile, scale, PRECISION)
    o_tile, lse = _finish(acc, total, peak)
    if SAVE:
        store_rows(o_selected, o_tile, row, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH)
        tl.store(lse_selected + row, lse, mask=inside)
    gate = gates + row * 3
    mixed = o_tile * tl.load(gate + 1, mask=inside, other=0).to(tl.float32)[:, None]

    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -1e30, tl.float32)
    for block in tl.range(inner, current):
        k_tile = load_all_rows(k + tl.cast(block, tl.int64) * BLOCK * k_stride, lane, k_stride, HEAD_DIM, WIDTH)
        v_tile = load_all_rows(v + tl.cast(block, tl.int64) * BLOCK * v_stride, lane, v_stride, HEAD_DIM, WIDTH)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        acc, total, peak = softmax_step(acc, total, peak, logits, v_tile, scale, PRECISION)
    for edge in tl.range(0, inner - first + 1):
        j = edge_block(edge, first, inner, current) * BLOCK + lane
        k_tile = load_rows(k, j.to(tl.int64), begin + j < end, k_stride, 0, HEAD_DIM, WIDTH)
        v_tile = load_rows(v, j.to(tl.int64), begin + j < end, v_stride, 0, HEAD_DIM, WIDTH)
        before = token[:, None] - begin - j[None, :]
        visible = (before >= 0) & (before < window)
        logits = tl.where(visible, tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), float("-inf"))
        acc, total, peak = softmax_step(acc, total, peak, logits, v_tile, scale, PRECISION)
    o_tile, lse = _finish(acc, total, peak)
    if SAVE:
        store_rows(o_window, o_tile, row, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH)
        tl.store(lse_window + row, lse, mask=inside)
    mixed += o_tile * tl.load(gate + 2, mask=inside, other=0).to(tl.float32)[:, None]
    o_tile = load_rows(o_compressed, row, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH).to(tl.float32)
    mixed += o_tile * tl.load(gate, mask=inside, other=0).to(tl.float32)[:, None]
    store_rows(o, mixed, row, inside, HEAD_DIM, 0, HEAD_DIM, WIDTH)


def attend(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, joint: Union, o_compressed: Tensor,
    sequences: Sequences, window_size: int, save: bool, rows: tuple[int, int],
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """o of the tokens `rows`, and if `save` o_selected, o_window, lse_selected and lse_window, as `Saved` has them."""
    tiles, first, count = tiles_of(sequences, shape.tile_tokens(shape.tune.attend_rows), rows)
    o, *saved = (torch.empty_like(o_compressed) for _ in range(3 if save else 1))
    saved += [torch.empty(*q.shape[:2], dtype=torch.float32, device=q.device) for _ in range(2 if save else 0)]
    attend_kernel[count * shape.kv_heads](
        q, k, v, gates, *joint, o_compressed, o, *(saved or [o] * 4), tiles.firsts, sequences.begins, sequences.ends,
        *row_strides(q, k, v), first, *rows, shape.kv_heads, min(window_size, shape.tokens), shape.log2_scale,
        **shape.constants(q.dtype), TOKENS=tiles.size, BLOCK=shape.block_size, CAPACITY=joint.blocks.shape[2],
        SAVE=save, **shape.tune.attend.options(),
    )  # fmt: skip
    return o, tuple(saved)
