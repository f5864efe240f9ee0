"""The short causal convolution in Triton, forward and backward.

With w_i = weight[:, width - 1 - i] on the input of i tokens before, and terms only within a sequence:

    s_t = sum_i w_i x_{t-i},  y_t = silu(s_t)
    ds_t = dy_t silu'(s_t),  dx_t = sum_i w_i ds_{t+i},  dw_i = sum_t ds_t x_{t-i}

A program walks along a span of tokens with a few channels a thread, and keeps the last `width` inputs and the
unfinished dx in registers: every input is read once, but for the width - 1 tokens around a span, and s is computed
again rather than stored. Spans' shares of dw are summed in a fixed order. What concerns the states, a few rows a
sequence, has kernels of its own.
"""

# Triton knows no unpacking within a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.sequences import Sequences

# Channels of a program, of one warp; rows whose loads are on their way together; programs that run at once.
_CHANNELS, _TOGETHER = 256, 4
_FORWARD_PROGRAMS, _BACKWARD_PROGRAMS = 132 * 20, 132 * 10
_SHORTEST_SPAN = 8


@triton.jit
def _shifted(first, window, WIDTH: tl.constexpr):
    """The tuple `window` of WIDTH blocks with `first` put before it and its last one dropped."""
    result = (first,)
    for i in tl.static_range(WIDTH - 1):
        result = result + (window[i],)
    return result


@triton.jit
def _taps(weight, channel, mask, WIDTH: tl.constexpr):
    """w_0 to w_{WIDTH - 1}."""
    taps = ()
    for i in tl.static_range(WIDTH):
        tap = tl.load(weight + channel * WIDTH + (WIDTH - 1 - i), mask=mask, other=0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def _window(x, first, stride, channel, mask, WIDTH: tl.constexpr):
    """x of the WIDTH rows before `first`, the latest first."""
    window = ()
    for i in tl.static_range(WIDTH):
        row = first - 1 - i
        window = window + (tl.load(x + row * stride + channel, mask=mask & (row >= 0), other=0).to(tl.float32),)
    return window


@triton.jit
def _within(window, offset, state, sequence, channel, mask, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
            STATE: tl.constexpr):  # fmt: skip
    """`window` of a token that has `offset` others of its sequence before it: what lies further back is its state's."""
    result = (window[0],)
    for i in tl.static_range(1, WIDTH):
        value = tl.where(offset >= i, window[i], 0.0)
        if STATE:
            slot = sequence.to(tl.int64) * (WIDTH - 1) + WIDTH - 1 + offset - i
            value += tl.load(state + slot * CHANNELS + channel, mask=mask & (offset < i), other=0).to(tl.float32)
        result = result + (value,)
    return result


@triton.jit
def _sum(taps, window, WIDTH: tl.constexpr):
    total = taps[0] * window[0]
    for i in tl.static_range(1, WIDTH):
        total += taps[i] * window[i]
    return total


@triton.jit
def _silu_gradient(x):
    gate = tl.sigmoid(x)
    return gate * (1 + x * (1 - gate))


@triton.jit
def _forward(
    x, weight, state, begins, index, y, stride, tokens, span,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < CHANNELS
    begin = tl.program_id(1).to(tl.int64) * span
    end = tl.minimum(begin + span, tokens)
    taps = _taps(weight, channel, mask, WIDTH)
    window = _window(x, begin, stride, channel, mask, WIDTH)
    for group in range(begin, end, TOGETHER):
        values, offsets, numbers = (), (), ()
        for i in tl.static_range(TOGETHER):
            row = group + i
            values = values + (tl.load(x + row * stride + channel, mask=mask & (row < end), other=0),)
            offsets = offsets + (row - tl.load(begins + row, mask=row < end, other=0),)
            numbers = numbers + (tl.load(index + row, mask=row < end, other=0) if STATE else 0,)
        for i in tl.static_range(TOGETHER):
            row = group + i
            window = _shifted(values[i].to(tl.float32), window, WIDTH)
            own = _within(window, offsets[i], state, numbers[i], channel, mask & (row < end), CHANNELS, WIDTH, STATE)
            total = _sum(taps, own, WIDTH)
            result = (total * tl.sigmoid(total)).to(y.dtype.element_ty)
            tl.store(y + row * CHANNELS + channel, result, mask=mask & (row < end))


@triton.jit
def _backward(
    x, weight, state, begins, index, dy, dx, dweight, stride, dy_stride, tokens, span,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """dweight: `[spans, CHANNELS, WIDTH]`."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < CHANNELS
    begin = tl.program_id(1).to(tl.int64) * span
    end = tl.minimum(begin + span, tokens)
    last = tl.minimum(end + WIDTH - 1, tokens)
    taps = _taps(weight, channel, mask, WIDTH)
    window = _window(x, begin, stride, channel, mask, WIDTH)
    zero = tl.zeros([BLOCK], tl.float32)
    unfinished, sums = (), ()
    for _ in tl.static_range(WIDTH):
        unfinished, sums = unfinished + (zero,), sums + (zero,)
    # dx of a row is complete WIDTH - 1 rows later.
    for group in range(begin, end + WIDTH - 1, TOGETHER):
        values, grads, offsets, numbers = (), (), (), ()
        for i in tl.static_range(TOGETHER):
            row = group + i
            values = values + (tl.load(x + row * stride + channel, mask=mask & (row < last), other=0),)
            grads = grads + (tl.load(dy + row * dy_stride + channel, mask=mask & (row < last), other=0),)
            offsets = offsets + (row - tl.load(begins + row, mask=row < last, other=0),)
            numbers = numbers + (tl.load(index + row, mask=row < last, other=0) if STATE else 0,)
        for i in tl.static_range(TOGETHER):
            row, offset = group + i, offsets[i]
            window = _shifted(values[i].to(tl.float32), window, WIDTH)
            own = _within(window, offset, state, numbers[i], channel, mask & (row < last), CHANNELS, WIDTH, STATE)
            ds = grads[i].to(tl.float32) * _silu_gradient(_sum(taps, own, WIDTH))
            counted = tl.where(row < end, ds, 0.0)
            unfinished = _shifted(zero, unfinished, WIDTH)
            new_unfinished, new_sums = (), ()
            for j in tl.static_range(WIDTH):
                new_unfinished = new_unfinished + (unfinished[j] + tl.where(offset >= j, taps[j] * ds, 0.0),)
                new_sums = new_sums + (sums[j] + counted * own[j],)
            unfinished, sums = new_unfinished, new_sums
            target = row - (WIDTH - 1)
            result = unfinished[WIDTH - 1].to(dx.dtype.element_ty)
            tl.store(dx + target * CHANNELS + channel, result, mask=mask & (target >= begin) & (target < end))
    for i in tl.static_range(WIDTH):
        place = (tl.program_id(1).to(tl.int64) * CHANNELS + channel) * WIDTH + (WIDTH - 1 - i)
        tl.store(dweight + place, sums[i], mask=mask)


@triton.jit
def _last_rows(
    x, state, borders, new_state, stride,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The state after each sequence, one program a sequence and block of channels."""
    sequence, channel = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, history = channel < CHANNELS, sequence * (WIDTH - 1)
    begin, end = tl.load(borders + sequence).to(tl.int64), tl.load(borders + sequence + 1).to(tl.int64)
    for i in tl.static_range(WIDTH - 1):
        row = end - (WIDTH - 1) + i
        value = tl.load(x + row * stride + channel, mask=mask & (row >= begin), other=0)
        if STATE:
            slot = history + WIDTH - 1 + row - begin
            value += tl.load(state + slot * CHANNELS + channel, mask=mask & (row < begin), other=0).to(value.dtype)
        tl.store(new_state + (history + i) * CHANNELS + channel, value, mask=mask)


@triton.jit
def _backward_last_rows(borders, dnew_state, dx, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The new state's gradient is added to that of the rows it consists of."""
    sequence, channel = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, history = channel < CHANNELS, sequence * (WIDTH - 1)
    begin, end = tl.load(borders + sequence).to(tl.int64), tl.load(borders + sequence + 1).to(tl.int64)
    for i in tl.static_range(WIDTH - 1):
        row = end - (WIDTH - 1) + i
        grad = tl.load(dnew_state + (history + i) * CHANNELS + channel, mask=mask, other=0).to(tl.float32)
        target = dx + row * CHANNELS + channel
        value = tl.load(target, mask=mask & (row >= begin), other=0).to(tl.float32) + grad
        tl.store(target, value.to(dx.dtype.element_ty), mask=mask & (row >= begin))


@triton.jit
def _backward_state(
    x, weight, state, borders, dy, dnew_state, dstate, stride, dy_stride,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PASSED: tl.constexpr,
):  # fmt: skip
    """The state's gradient: from the first WIDTH - 1 tokens, and where PASSED from what of it is in the new state."""
    sequence, channel = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, history = channel < CHANNELS, sequence * (WIDTH - 1)
    begin, end = tl.load(borders + sequence).to(tl.int64), tl.load(borders + sequence + 1).to(tl.int64)
    taps = _taps(weight, channel, mask, WIDTH)
    window = ()
    for i in tl.static_range(WIDTH - 1):
        slot = history + WIDTH - 2 - i
        window = window + (tl.load(state + slot * CHANNELS + channel, mask=mask, other=0).to(tl.float32),)
    window = window + (tl.zeros([BLOCK], tl.float32),)
    gradients = ()
    for i in tl.static_range(WIDTH - 1):
        row = begin + i
        inside = mask & (row < end)
        window = _shifted(tl.load(x + row * stride + channel, mask=inside, other=0).to(tl.float32), window, WIDTH)
        grad = tl.load(dy + row * dy_stride + channel, mask=inside, other=0).to(tl.float32)
        gradients = gradients + (grad * _silu_gradient(_sum(taps, window, WIDTH)),)
    for slot in tl.static_range(WIDTH - 1):
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(slot + 1):
            total += taps[WIDTH - 1 + i - slot] * gradients[i]
        if PASSED:
            # A sequence of n tokens moves the state's slots n to the front.
            other = slot - (end - begin)
            place = (history + other) * CHANNELS + channel
            total += tl.load(dnew_state + place, mask=mask & (other >= 0), other=0).to(tl.float32)
        tl.store(dstate + (history + slot) * CHANNELS + channel, total.to(dstate.dtype.element_ty), mask=mask)


class _Convolution(torch.autograd.Function):
    """Saves x, weight and the initial state."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, state: Tensor | None, sequences: Sequences):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        new_state = x.new_empty(sequences.count, weight.shape[1] - 1, x.shape[1])
        grid, span, constants = _cut(x, weight, _FORWARD_PROGRAMS)
        flags = {"STATE": state is not None}
        held = x if state is None else state
        index = sequences.begins if state is None else sequences.index
        _forward[grid](
            x, weight, held, sequences.begins, index, y, x.stride(0), len(x), span, **constants, **flags,
            TOGETHER=_TOGETHER, num_warps=1,
        )  # fmt: skip
        _last_rows[(grid[0], sequences.count)](
            x, held, sequences.cu_seqlens, new_state, x.stride(0), **constants, **flags, num_warps=1
        )
        ctx.sequences = sequences
        ctx.save_for_backward(x, weight, state)
        ctx.set_materialize_grads(False)
        return y, new_state

    @staticmethod
    def backward(ctx, dy: Tensor | None, dnew_state: Tensor | None):
        x, weight, state = ctx.saved_tensors
        sequences, held = ctx.sequences, x if state is None else state
        dy = torch.zeros_like(x) if dy is None else _rows(dy)
        dx, dstate = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
        grid, span, constants = _cut(x, weight, _BACKWARD_PROGRAMS)
        dweight = torch.empty(grid[1], *weight.shape, dtype=torch.float32, device=x.device)
        index = sequences.begins if state is None else sequences.index
        _backward[grid](
            x, weight, held, sequences.begins, index, dy, dx, dweight, x.stride(0), dy.stride(0), len(x), span,
            **constants, STATE=state is not None, TOGETHER=_TOGETHER, num_warps=1,
        )  # fmt: skip
        ends, borders = (grid[0], sequences.count), sequences.cu_seqlens
        passed = dnew_state is not None
        dnew_state = dnew_state.contiguous() if passed else dx
        if passed:
            _backward_last_rows[ends](borders, dnew_state, dx, **constants, num_warps=1)
        if state is not None and ctx.needs_input_grad[2]:
            dstate = torch.empty_like(state)
            _backward_state[ends](
                x, weight, state, borders, dy, dnew_state, dstate, x.stride(0), dy.stride(0), **constants,
                PASSED=passed, num_warps=1,
            )  # fmt: skip
        return dx, dweight.sum(0).to(weight.dtype), dstate, None


def _cut(x: Tensor, weight: Tensor, programs: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid of channel blocks and spans, tokens of a span, and constexpr arguments."""
    (tokens, channels), width = x.shape, weight.shape[1]
    block = min(_CHANNELS, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    span = max(_SHORTEST_SPAN, triton.cdiv(tokens, max(1, programs // blocks)))
    return (blocks, triton.cdiv(tokens, span)), span, {"CHANNELS": channels, "BLOCK": block, "WIDTH": width}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def causal_conv1d(
    x: Tensor, weight: Tensor, sequences: Sequences, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `megahybrid_kernels.causal_conv1d`; float32, bfloat16 or float16."""
    state = None if initial_state is None else initial_state.contiguous()
    return _Convolution.apply(_rows(x), weight.contiguous(), state, sequences)
