"""What the router's kernels need beside their products, a launch for all layers: packed weights, the sums of weights'
gradients, and the rows that a state keeps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.activations import silu
from megahybrid_kernels.integers import cdiv, tile_width
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.sequences import Sequences

_LAYERS = 3  # at most
# Values, and rows of a state, that a program takes at once.
_VALUES, _ROWS = 512, 4


@triton.jit
def _own_block(heads, blocks):
    """This program's block of a head, the head, and the layer."""
    program = tl.program_id(0)
    return program % blocks, (program // blocks % heads).to(tl.int64), program // blocks // heads


@triton.jit
def _pack_weight(weight, packed, block, head, channels, taps, out, BLOCK: tl.constexpr):
    """A block of one head and layer of `pack_weights_kernel`."""
    place, size = block * BLOCK + tl.arange(0, BLOCK), channels * taps * out
    column, channel, tap = place % out, place // out % channels, place // (out * channels)
    source = head * size + (column * channels + channel) * taps + tap
    value = tl.load(weight + source, mask=place < size, other=0).to(tl.float32)
    tl.store(packed + head * size + place, value.to(packed.dtype.element_ty), mask=place < size)


@kernel
def pack_weights_kernel(
    weight0, weight1, weight2, packed0, packed1, packed2, heads, blocks, channels0, channels1, channels2,
    taps0, taps1, taps2, out0, out1, out2, BLOCK: tl.constexpr,
):  # fmt: skip
    """`[heads * out, channels, taps]` -> `[heads, taps, channels, out]`."""
    block, head, layer = _own_block(heads, blocks)
    if layer == 0:
        _pack_weight(weight0, packed0, block, head, channels0, taps0, out0, BLOCK)
    elif layer == 1:
        _pack_weight(weight1, packed1, block, head, channels1, taps1, out1, BLOCK)
    else:
        _pack_weight(weight2, packed2, block, head, channels2, taps2, out2, BLOCK)


@triton.jit
def _sum_values(shares, splits, head, heads, count, place):
    """fp32, each of a head's `count` values of `[splits, heads, count]` summed over splits in order."""
    total = tl.zeros_like(place).to(tl.float32)
    for split in tl.range(0, splits):
        own = shares + (split * heads + head) * count
        total += tl.load(own + place, mask=place < count, other=0)
    return total


@triton.jit
def _sum_layer(
    dweight_splits, dbias_splits, dweight, dbias, splits, block, head, heads, channels, taps, out, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of one head and layer of `sum_splits_kernel`."""
    place, size = block * BLOCK + tl.arange(0, BLOCK), channels * taps * out
    if block * BLOCK < size:
        total = _sum_values(dweight_splits, splits, head, heads, size, place)
        column, channel, tap = place % out, place // out % channels, place // (out * channels)
        target = head * size + (column * channels + channel) * taps + tap
        tl.store(dweight + target, total.to(dweight.dtype.element_ty), mask=place < size)
    if block * BLOCK < out:
        total = _sum_values(dbias_splits, splits, head, heads, out, place)
        tl.store(dbias + head * out + place, total.to(dbias.dtype.element_ty), mask=place < out)


@kernel
def sum_splits_kernel(
    dweight_splits0, dweight_splits1, dweight_splits2, dbias_splits0, dbias_splits1, dbias_splits2,
    dweight0, dweight1, dweight2, dbias0, dbias1, dbias2, splits0, splits1, splits2, heads, blocks,
    channels0, channels1, channels2, taps0, taps1, taps2, out0, out1, out2, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `backward_weight_kernel` left, summed over splits in order, in the parameters' layouts and dtypes.

    dweight: `[heads * out, channels, taps]` of all channels; dbias: `[heads * out]`.
    """
    block, head, layer = _own_block(heads, blocks)
    if layer == 0:
        _sum_layer(
            dweight_splits0, dbias_splits0, dweight0, dbias0, splits0, block, head, heads, channels0, taps0, out0, BLOCK
        )
    elif layer == 1:
        _sum_layer(
            dweight_splits1, dbias_splits1, dweight1, dbias1, splits1, block, head, heads, channels1, taps1, out1, BLOCK
        )
    else:
        _sum_layer(
            dweight_splits2, dbias_splits2, dweight2, dbias2, splits2, block, head, heads, channels2, taps2, out2, BLOCK
        )


@triton.jit
def _copy_rows(
    x, target, borders, sequence, head, heads, stride, head_stride, columns, first_column, channels, past, late,
    ACTIVATE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One layer, or one half of the first one's channels, of `state_rows_kernel`."""
    begin, end = tl.load(borders + sequence), tl.load(borders + sequence + 1)
    channel = tl.arange(0, WIDTH)
    for first in range(0, past, ROWS):
        slot = first + tl.arange(0, ROWS)
        row = end - late - past + slot
        mask = (slot < past)[:, None] & (channel < channels)[None, :]
        places = head * head_stride + row.to(tl.int64)[:, None] * stride + channel[None, :]
        value = tl.load(x + places, mask=mask & (row >= begin)[:, None], other=0).to(tl.float32)
        if ACTIVATE:
            value = silu(value)
        at = ((sequence * past + slot) * heads + head)[:, None] * columns + first_column + channel[None, :]
        tl.store(target + at, value, mask=mask)


@kernel
def state_rows_kernel(
    k, v, y0, y1, rows0, rows1, rows2, borders, count, heads, k_stride, k_head_stride, v_stride, v_head_stride,
    y0_head_stride, y1_head_stride, half, channels1, channels2, past0, past1, past2, late1, late2,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`RouterState.rows` after the sequences between `borders`: zero for rows before a sequence's first.

    Layer n keeps `past` rows of its input, the last of which stands `late` rows before the sequence's last: k and v of
    `half` channels side by side, then SiLU(y), y `[kv_heads, tokens, channels]`.
    """
    sequence, head, layer = _own_block(heads, count)
    sequence = sequence.to(tl.int64)
    if layer == 0:
        _copy_rows(
            k, rows0, borders, sequence, head, heads, k_stride, k_head_stride, 2 * half, 0, half, past0, 0,
            False, WIDTH, ROWS,
        )  # fmt: skip
        _copy_rows(
            v, rows0, borders, sequence, head, heads, v_stride, v_head_stride, 2 * half, half, half, past0, 0,
            False, WIDTH, ROWS,
        )  # fmt: skip
    elif layer == 1:
        _copy_rows(
            y0, rows1, borders, sequence, head, heads, channels1, y0_head_stride, channels1, 0, channels1, past1, late1,
            True, WIDTH, ROWS,
        )  # fmt: skip
    else:
        _copy_rows(
            y1, rows2, borders, sequence, head, heads, channels2, y1_head_stride, channels2, 0, channels2, past2, late2,
            True, WIDTH, ROWS,
        )  # fmt: skip


def three(*columns: list) -> Iterator:
    """Values of each column, one a layer, up to three layers; the last repeated where there are fewer."""
    return itertools.chain.from_iterable(column + column[-1:] * (_LAYERS - len(column)) for column in columns)


def _sizes(weights: list[Tensor], heads: int) -> Iterator[int]:
    """Channels, taps and outputs of the kernels' layers."""
    return three([w.shape[1] for w in weights], [w.shape[2] for w in weights], [w.shape[0] // heads for w in weights])


def _blocks(weights: list[Tensor], heads: int) -> int:
    """Of a head of the largest layer."""
    return cdiv(max(w.numel() for w in weights) // heads, _VALUES)


def pack_weights(weights: list[Tensor], heads: int, dtypes: list[torch.dtype]) -> list[Tensor]:
    """Weights `[heads * out, channels, taps]` as `[heads, taps, channels, out]`, each in its dtype."""
    weights = [weight.contiguous() for weight in weights]
    packed = [
        torch.empty(heads, w.shape[2], w.shape[1], w.shape[0] // heads, dtype=dtype, device=w.device)
        for w, dtype in zip(weights, dtypes, strict=True)
    ]
    blocks = _blocks(weights, heads)
    pack_weights_kernel[blocks * heads * len(weights)](
        *three(weights, packed), heads, blocks, *_sizes(weights, heads), BLOCK=_VALUES
    )
    return packed


def sum_splits(
    weights: list[Tensor], heads: int, splits: list[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the weights and biases from `splits`, each layer's as `backward_weight_kernel` left them."""
    dweights = [torch.empty(*w.shape, dtype=w.dtype, device=w.device) for w in weights]
    dbiases = [torch.empty(w.shape[0], dtype=w.dtype, device=w.device) for w in weights]
    parts = ([dweight for dweight, _ in splits], [dbias for _, dbias in splits])
    counts = [dweight.shape[0] for dweight, _ in splits]
    blocks = _blocks(weights, heads)
    sum_splits_kernel[blocks * heads * len(weights)](
        *three(*parts, dweights, dbiases, counts), heads, blocks, *_sizes(weights, heads), BLOCK=_VALUES
    )
    return dweights, dbiases


def state_rows(
    k: Tensor, v: Tensor, ys: list[Tensor], weights: list[Tensor], sequences: Sequences, dilation: int
) -> tuple[Tensor, ...]:
    """`RouterState.rows` after sequences that begin here; ys: every layer's y, k and v as the layers read them."""
    heads, half = k.shape[1:]
    channels, taps = [w.shape[1] for w in weights], [w.shape[2] for w in weights]
    past = [(each - 1) * dilation for each in taps]
    late = list(itertools.accumulate(each // 2 * dilation for each in taps))
    rows = [
        torch.empty(sequences.count, count, heads, width, dtype=torch.float32, device=k.device)
        for count, width in zip(past, channels, strict=True)
    ]
    y0, y1, _ = three(ys)
    _, *later_channels = three(channels)
    *later_late, _ = three(late)
    state_rows_kernel[sequences.count * heads * len(weights)](
        k, v, y0, y1, *three(rows), sequences.cu_seqlens, sequences.count, heads, *k.stride()[:2], *v.stride()[:2],
        y0.stride(0), y1.stride(0), half, *later_channels, *three(past), *later_late,
        WIDTH=tile_width(max([half, *channels[1:]])), ROWS=_ROWS,
    )  # fmt: skip
    return tuple(rows)
