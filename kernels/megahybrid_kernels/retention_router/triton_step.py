"""One step of the streamed router in Triton: a launch for all layers, one new token of every sequence.

A program takes one KV head of some sequences. Its work is `2 kernel_size sum(channels_in channels_out)` FLOPs a
sequence; its bytes are mostly the head's weights, which all programs of a head share through the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.activations import silu
from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.integers import cdiv, tile_width
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.retention_router.parameters import RouterParameters, RouterState
from megahybrid_kernels.targets import table_of

_SEQUENCES = 16


@triton.jit
def _taps(
    acc, x, places, weight, tap, half, exists,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, HALVES: tl.constexpr,
    TAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tap's product with one half of the channels, whose values stand at `places` of x."""
    channel, out = tl.arange(0, WIDTH), tl.arange(0, OUT_WIDTH)
    mask = exists[:, None] & (channel < CHANNELS)[None, :]
    value = tl.load(x + places[:, None] + channel[None, :], mask=mask, other=0)
    at = ((out[None, :] * HALVES + half) * CHANNELS + channel[:, None]) * TAPS + tap
    matrix = tl.load(weight + at, mask=(channel < CHANNELS)[:, None] & (out < OUT)[None, :], other=0)
    return tl.dot(value.to(tl.float32), matrix.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def _layer(
    new, new_places, second, second_places, state, next_state, weight, bias, sequence, head, heads, exists, position,
    dilation, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    HALVES: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SiLU(y) `[sequences, OUT_WIDTH]` of a layer whose newest input is `new` (and `second` beside it); shifts the
    rows of its state by that input. `position` is that of the output."""
    channels_in: tl.constexpr = CHANNELS * HALVES
    past = (TAPS - 1) * dilation
    weight += head * (OUT * channels_in * TAPS)
    out = tl.arange(0, OUT_WIDTH)
    channel = tl.arange(0, WIDTH)
    mask = exists[:, None] & (channel < CHANNELS)[None, :]
    acc = tl.zeros([exists.shape[0], OUT_WIDTH], tl.float32)
    for half in tl.static_range(HALVES):
        rows = (sequence.to(tl.int64) * past * heads + head) * channels_in + half * CHANNELS
        for tap in tl.static_range(TAPS - 1):
            places = rows + tap * dilation * heads * channels_in
            acc = _taps(
                acc, state, places, weight, tap, half, exists, CHANNELS, WIDTH, OUT, OUT_WIDTH, HALVES, TAPS, PRECISION
            )  # fmt: skip
        source = second if half else new
        places = second_places if half else new_places
        acc = _taps(
            acc, source, places, weight, TAPS - 1, half, exists, CHANNELS, WIDTH, OUT, OUT_WIDTH, HALVES, TAPS,
            PRECISION,
        )  # fmt: skip
        for row in range(past - 1):
            at = rows[:, None] + row * heads * channels_in + channel[None, :]
            tl.store(next_state + at, tl.load(state + at + heads * channels_in, mask=mask, other=0), mask=mask)
        newest = tl.load(source + places[:, None] + channel[None, :], mask=mask, other=0)
        at = rows[:, None] + (past - 1) * heads * channels_in + channel[None, :]
        tl.store(next_state + at, newest.to(tl.float32), mask=mask)
    acc += tl.load(bias + head * OUT + out, mask=out < OUT, other=0).to(tl.float32)[None, :]
    # Before the document's start the next layer must find zeros, as its padding would be.
    return tl.where((position >= 0)[:, None], silu(acc), 0)


@kernel
def _step(
    new, second, state, next_state, weight, bias, y, projection, projection_bias, logits, positions, count,
    stride, head_stride, second_stride, second_head_stride, late, dilation,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, HALVES: tl.constexpr,
    TAPS: tl.constexpr, LAST: tl.constexpr, SEQUENCES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One layer: y, fp32 `[sequences, kv_heads, OUT]`, and from the last the logits."""
    blocks = tl.cdiv(count, SEQUENCES)
    head, heads = (tl.program_id(0) // blocks).to(tl.int64), tl.num_programs(0) // blocks
    sequence = tl.program_id(0) % blocks * SEQUENCES + tl.arange(0, SEQUENCES)
    exists = sequence < count
    position = tl.load(positions + sequence, mask=exists, other=-1) - late
    value = _layer(
        new, sequence.to(tl.int64) * stride + head * head_stride,
        second, sequence.to(tl.int64) * second_stride + head * second_head_stride,
        state, next_state, weight, bias, sequence, head, heads, exists, position, dilation,
        CHANNELS, WIDTH, OUT, OUT_WIDTH, HALVES, TAPS, PRECISION,
    )  # fmt: skip
    out = tl.arange(0, OUT_WIDTH)
    if LAST:
        vector = tl.load(projection + head * OUT + out, mask=out < OUT, other=0).to(tl.float32)
        logit = tl.sum(value * vector[None, :], 1) + tl.load(projection_bias + head).to(tl.float32)
        tl.store(logits + sequence.to(tl.int64) * heads + head, logit, mask=exists)
    else:
        places = (sequence.to(tl.int64) * heads + head)[:, None] * OUT + out[None, :]
        tl.store(y + places, value, mask=exists[:, None] & (out < OUT)[None, :])


def retention_logits_step(
    k: Tensor, v: Tensor, parameters: RouterParameters, positions: Tensor, state: RouterState, dilation: int
) -> tuple[Tensor, RouterState]:
    """`retention_logits_streamed` for one new token of every sequence, without gradients.

    Args:
        k, v: `[sequences, kv_heads, head_dim]`.
        positions: int64 `[sequences]`, of the new tokens.
        parameters, state, dilation: as for `retention_logits_streamed`.
    """
    k, v = map(dense_rows, (k, v))
    count, heads = k.shape[:2]
    logits = torch.empty(count, heads, dtype=torch.float32, device=k.device)
    inputs, rows = (k, v), []
    projection, projection_bias = parameters.projection.contiguous(), parameters.projection_bias.contiguous()
    layers = zip(parameters.weights, parameters.biases, state.rows, strict=True)
    for number, layer in enumerate(layers):
        weight, bias, past = (x.contiguous() for x in layer)
        channels, out, taps = weight.shape[1] // len(inputs), weight.shape[0] // heads, weight.shape[2]
        y = torch.empty(count, heads, out, dtype=torch.float32, device=k.device)
        rows.append(torch.empty_like(past))
        first, second = inputs[0], inputs[-1]
        _step[cdiv(count, _SEQUENCES) * heads](
            first, second, past, rows[-1], weight, bias, y, projection, projection_bias, logits,
            positions, count, *first.stride()[:2], *second.stride()[:2], (number + 1) * (taps // 2) * dilation,
            dilation, CHANNELS=channels, WIDTH=tile_width(channels), OUT=out,
            OUT_WIDTH=tile_width(out), HALVES=len(inputs), TAPS=taps,
            LAST=number == len(parameters.weights) - 1, SEQUENCES=_SEQUENCES,
            PRECISION=table_of(k.device).precise,
        )  # fmt: skip
        inputs = (y,)
    return logits, RouterState(tuple(rows))
