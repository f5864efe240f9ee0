"""One step of the streamed router in Triton: a launch for all layers, one new token of every sequence.

A program takes one KV head of some sequences through all layers. Its work is `2 kernel_size sum(channels_in
channels_out)` FLOPs a sequence; its bytes are mostly the head's weights, which all programs of a head share through the
cache. What a layer reads of its newest row, it reads from its next state, to where the layer before has written it.
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
from megahybrid_kernels.retention_router.triton_copies import three
from megahybrid_kernels.targets import table_of

# Sequences of a program; channels that it multiplies at once, since more of a weight would not stay in registers.
_SEQUENCES, _CHANNELS = 16, 32


@triton.jit
def _write_newest(rows, values, sequence, head, heads, exists, late, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
                  FIRST: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """COUNT of the CHANNELS of the last of `late` rows of a state, from FIRST on."""
    channel = tl.arange(0, WIDTH)
    at = ((sequence * late + late - 1) * heads + head)[:, None] * CHANNELS + FIRST + channel[None, :]
    tl.store(rows + at, values.to(tl.float32), mask=exists[:, None] & (channel < COUNT)[None, :])


@triton.jit
def _layer(
    state, next_state, weight, bias, sequence, head, heads, exists, position, dilation, CHANNELS: tl.constexpr,
    OUT: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """SiLU(y) `[sequences, OUT_WIDTH]` at `position`, from the state and the newest row of the next one, whose others
    are written."""
    past, row_size = (TAPS - 1) * dilation, heads * CHANNELS
    first_row = (sequence * past * heads + head) * CHANNELS
    channel = tl.arange(0, WIDTH)
    mask = exists[:, None] & (channel < CHANNELS)[None, :]
    for row in range(past - 1):
        at = first_row[:, None] + row * row_size + channel[None, :]
        tl.store(next_state + at, tl.load(state + at + row_size, mask=mask, other=0), mask=mask)
    out = tl.arange(0, OUT_WIDTH)
    weight += head * (OUT * CHANNELS * TAPS)
    acc = tl.zeros([exists.shape[0], OUT_WIDTH], tl.float32)
    for tap in tl.static_range(TAPS):
        rows = next_state + (past - 1) * row_size if tap == TAPS - 1 else state + tap * dilation * row_size
        for first in range(0, CHANNELS, STEP):
            some = first + tl.arange(0, STEP)
            inside = some < CHANNELS
            at = first_row[:, None] + some[None, :]
            value = tl.load(rows + at, mask=exists[:, None] & inside[None, :], other=0)
            at = (out[None, :] * CHANNELS + some[:, None]) * TAPS + tap
            matrix = tl.load(weight + at, mask=inside[:, None] & (out < OUT)[None, :], other=0)
            acc = tl.dot(value, matrix.to(tl.float32), acc, input_precision=PRECISION)
    acc += tl.load(bias + head * OUT + out, mask=out < OUT, other=0).to(tl.float32)[None, :]
    # Before the document's start the next layer must find zeros, as its padding would be.
    return tl.where((position >= 0)[:, None], silu(acc), 0)


@kernel
def step_kernel(
    k, v, state0, state1, state2, next0, next1, next2, weight0, weight1, weight2, bias0, bias1, bias2, projection,
    projection_bias, scores, positions, count, k_stride, k_head_stride, v_stride, v_head_stride, dilation,
    CHANNELS0: tl.constexpr, CHANNELS1: tl.constexpr, CHANNELS2: tl.constexpr, OUT0: tl.constexpr, OUT1: tl.constexpr,
    OUT2: tl.constexpr, TAPS0: tl.constexpr, TAPS1: tl.constexpr, TAPS2: tl.constexpr, WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, OUT_WIDTH0: tl.constexpr, OUT_WIDTH1: tl.constexpr,
    OUT_WIDTH2: tl.constexpr, LAYERS: tl.constexpr, SEQUENCES: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores and the next states of up to three layers."""
    blocks = tl.cdiv(count, SEQUENCES)
    head, heads = (tl.program_id(0) // blocks).to(tl.int64), tl.num_programs(0) // blocks
    number = tl.program_id(0) % blocks * SEQUENCES + tl.arange(0, SEQUENCES)
    exists, sequence = number < count, number.to(tl.int64)
    position = tl.load(positions + number, mask=exists, other=-1)
    half: tl.constexpr = CHANNELS0 // 2
    channel, late = tl.arange(0, WIDTH0), (TAPS0 - 1) * dilation
    mask = exists[:, None] & (channel < half)[None, :]
    newest = tl.load(k + (sequence * k_stride + head * k_head_stride)[:, None] + channel[None, :], mask=mask, other=0)
    _write_newest(next0, newest, sequence, head, heads, exists, late, CHANNELS0, WIDTH0, 0, half)
    newest = tl.load(v + (sequence * v_stride + head * v_head_stride)[:, None] + channel[None, :], mask=mask, other=0)
    _write_newest(next0, newest, sequence, head, heads, exists, late, CHANNELS0, WIDTH0, half, half)
    tl.debug_barrier()  # all of the program have written what any of it reads
    position -= TAPS0 // 2 * dilation
    value = _layer(
        state0, next0, weight0, bias0, sequence, head, heads, exists, position, dilation, CHANNELS0, OUT0, TAPS0,
        WIDTH0, OUT_WIDTH0, STEP, PRECISION,
    )  # fmt: skip
    if LAYERS > 1:
        late = (TAPS1 - 1) * dilation
        _write_newest(next1, value, sequence, head, heads, exists, late, CHANNELS1, OUT_WIDTH0, 0, CHANNELS1)
        tl.debug_barrier()
        position -= TAPS1 // 2 * dilation
        value = _layer(
            state1, next1, weight1, bias1, sequence, head, heads, exists, position, dilation, CHANNELS1, OUT1, TAPS1,
            WIDTH1, OUT_WIDTH1, STEP, PRECISION,
        )  # fmt: skip
    if LAYERS > 2:
        late = (TAPS2 - 1) * dilation
        _write_newest(next2, value, sequence, head, heads, exists, late, CHANNELS2, OUT_WIDTH1, 0, CHANNELS2)
        tl.debug_barrier()
        position -= TAPS2 // 2 * dilation
        value = _layer(
            state2, next2, weight2, bias2, sequence, head, heads, exists, position, dilation, CHANNELS2, OUT2, TAPS2,
            WIDTH2, OUT_WIDTH2, STEP, PRECISION,
        )  # fmt: skip
    out = tl.arange(0, value.shape[1])
    last: tl.constexpr = OUT2 if LAYERS > 2 else OUT1 if LAYERS > 1 else OUT0
    vector = tl.load(projection + head * last + out, mask=out < last, other=0).to(tl.float32)
    logit = tl.sum(value * vector[None, :], 1) + tl.load(projection_bias + head).to(tl.float32)
    tl.store(scores + sequence * heads + head, tl.sigmoid(logit) - 0.5, mask=exists)


def retention_scores_step(
    k: Tensor,
    v: Tensor,
    parameters: RouterParameters,
    positions: Tensor,
    state: RouterState,
    dilation: int,
) -> tuple[Tensor, RouterState]:
    """`retention_scores_streamed` for one new token of every sequence, without gradients.

    Args:
        k, v: `[sequences, kv_heads, head_dim]`.
        positions: int64 `[sequences]`, of the new tokens.
        parameters, state, dilation: as for `retention_scores_streamed`.
    """
    k, v = map(dense_rows, (k, v))
    count, heads = k.shape[:2]
    scores = torch.empty(count, heads, dtype=torch.float32, device=k.device)
    weights, biases, states = ([x.contiguous() for x in each] for each in (*parameters[:2], state.rows))
    rows = [torch.empty_like(past) for past in states]
    channels, outs = [weight.shape[1] for weight in weights], [weight.shape[0] // heads for weight in weights]
    sizes = {"CHANNELS": channels, "OUT": outs, "TAPS": [weight.shape[2] for weight in weights]}
    # The first layer's tile holds its channels when it moves rows, and k or v before.
    sizes |= {"WIDTH": list(map(tile_width, channels)), "OUT_WIDTH": list(map(tile_width, outs))}
    constants = {f"{name}{n}": each[min(n, len(each) - 1)] for name, each in sizes.items() for n in range(3)}
    step_kernel[cdiv(count, _SEQUENCES) * heads](
        k, v, *three(states, rows, weights, biases), parameters.projection.contiguous(),
        parameters.projection_bias.contiguous(), scores, positions, count, *k.stride()[:2], *v.stride()[:2], dilation,
        **constants, LAYERS=len(weights), SEQUENCES=_SEQUENCES, STEP=_CHANNELS,
        PRECISION=table_of(k.device).precise,
    )  # fmt: skip
    return scores, RouterState(tuple(rows))
