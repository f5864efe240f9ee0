"""The short causal convolution in Triton, forward and backward.

With w_i = weight[:, width - 1 - i] on the input of i tokens before, and terms only within a sequence:

    s_t = sum_i w_i x_{t-i},  y_t = silu(s_t)
    ds_t = dy_t silu'(s_t),  dx_t = sum_i w_i ds_{t+i},  dw_i = sum_t ds_t x_{t-i}

A program walks along a span of tokens with a few channels a thread, from border to border of the sequences in it, so
that no tap between has to be masked. It keeps the last `width` inputs and the unfinished dx in registers, and the loads
of the next rows are on their way: every input is read once, but for the width - 1 tokens around a span, and s is
computed again rather than stored. Spans' shares of dw are summed in a fixed order. What concerns the states' gradients,
a few rows a sequence, has kernels of its own.
"""

# Triton knows no unpacking within a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.activations import silu_slope
from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.integers import cdiv, next_power_of_2
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.sequences import Sequences
from megahybrid_kernels.shares import sum_shares
from megahybrid_kernels.untracked import applied

# Channels of a program and of a thread; bytes of a channel whose loads are on their way together; programs that run at
# once: 16 warps on each of 132 multiprocessors have 128 registers a thread.
_CHANNELS, _PER_THREAD, _BYTES = 128, 4, 8
_FORWARD_PROGRAMS, _BACKWARD_PROGRAMS = 132 * 24, 132 * 16
_SHORTEST_SPAN = 8


@triton.jit
def _own_channels(CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's channels, and the number of its span (or sequence)."""
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    return tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), tl.program_id(0) // blocks


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
def _row(x, state, row, begin, sequence, channel, mask, STRIDE: tl.constexpr, CHANNELS: tl.constexpr,
         WIDTH: tl.constexpr, STATE: tl.constexpr):  # fmt: skip
    """x of a row, at most WIDTH - 1 before the row `begin` where its sequence begins: there its state, or 0."""
    value = tl.load(_row_at(x, row, channel, STRIDE), mask=mask & (row >= begin), other=0)
    if STATE:
        slot = sequence * (WIDTH - 1) + WIDTH - 1 + row - begin
        value += tl.load(state + slot * CHANNELS + channel, mask=mask & (row < begin), other=0).to(value.dtype)
    return value


@triton.jit
def _window(x, state, first, begin, sequence, channel, mask, STRIDE: tl.constexpr, CHANNELS: tl.constexpr,
            WIDTH: tl.constexpr, STATE: tl.constexpr):  # fmt: skip
    """x of the WIDTH - 1 rows before `first`, the latest first, and a block that a shift drops."""
    window = ()
    for i in tl.static_range(WIDTH - 1):
        value = _row(x, state, first - 1 - i, begin, sequence, channel, mask, STRIDE, CHANNELS, WIDTH, STATE)
        window = window + (value.to(tl.float32),)
    return window + (tl.zeros(channel.shape, tl.float32),)


@triton.jit
def _row_at(x, row, channel, STRIDE: tl.constexpr):
    return x + row.to(tl.int64) * STRIDE + channel


@triton.jit
def _load_rows(at, rows, mask, STRIDE: tl.constexpr, TOGETHER: tl.constexpr):
    """TOGETHER rows from `at` on, 0 where there are only `rows`."""
    values = ()
    for i in tl.static_range(TOGETHER):
        values = values + (tl.load(at + i * STRIDE, mask=mask & (i < rows), other=0),)
    return values


@triton.jit
def _sum(taps, window, WIDTH: tl.constexpr):
    total = taps[0] * window[0]
    for i in tl.static_range(1, WIDTH):
        total += taps[i] * window[i]
    return total


@triton.jit
def _sigmoid(x):
    # exp2 and rsqrt are an instruction each; exp and a division take nine for the range of denormal numbers.
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def _silu_gradient(x):
    return silu_slope(x, _sigmoid(x))


@kernel(do_not_specialize=["tokens", "span"])
def conv1d_kernel(
    x, weight, state, index, borders, y, new_state, tokens, span, STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """y of a span of tokens and a block of channels, and the new state of the sequences that end in it unless None."""
    channel, number = _own_channels(CHANNELS, BLOCK)
    mask = channel < CHANNELS
    begin = number * span
    end = tl.minimum(begin + span, tokens)
    taps = _taps(weight, channel, mask, WIDTH)
    for sequence in range(tl.load(index + begin), tl.load(index + end - 1) + 1):
        own, after = tl.load(borders + sequence), tl.load(borders + sequence + 1)
        first, stop = tl.maximum(begin, own), tl.minimum(end, after)
        window = _window(x, state, first, own, sequence, channel, mask, STRIDE, CHANNELS, WIDTH, STATE)
        x_at, y_at = _row_at(x, first, channel, STRIDE), _row_at(y, first, channel, CHANNELS)
        coming = _load_rows(x_at, stop - first, mask, STRIDE, TOGETHER)
        for group in range(first, stop, TOGETHER):
            later = ()
            for i in tl.static_range(TOGETHER):
                row = group + i
                window = _shifted(coming[i].to(tl.float32), window, WIDTH)
                inside = mask & (row + TOGETHER < stop)
                later = later + (tl.load(x_at + (i + TOGETHER) * STRIDE, mask=inside, other=0),)
                total = _sum(taps, window, WIDTH)
                result = (total * _sigmoid(total)).to(y.dtype.element_ty)
                tl.store(y_at + i * CHANNELS, result, mask=mask & (row < stop))
            coming = later
            x_at += TOGETHER * STRIDE
            y_at += TOGETHER * CHANNELS
        if new_state is not None:  # noqa: SIM102, known when compiled
            if stop == after:
                for i in tl.static_range(WIDTH - 1):
                    row = after - (WIDTH - 1) + i
                    value = _row(x, state, row, own, sequence, channel, mask, STRIDE, CHANNELS, WIDTH, STATE)
                    tl.store(new_state + (sequence * (WIDTH - 1) + i) * CHANNELS + channel, value, mask=mask)


@kernel(do_not_specialize=["tokens", "span"])
def conv1d_backward_kernel(
    x, weight, state, index, borders, dy, dx, dweight, tokens, span, STRIDE: tl.constexpr, DY_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """dweight: `[spans, WIDTH, CHANNELS]`."""
    channel, number = _own_channels(CHANNELS, BLOCK)
    mask = channel < CHANNELS
    begin = number * span
    end = tl.minimum(begin + span, tokens)
    taps = _taps(weight, channel, mask, WIDTH)
    zero = tl.zeros([BLOCK], tl.float32)
    sums = ()
    for _ in tl.static_range(WIDTH):
        sums = sums + (zero,)
    for sequence in range(tl.load(index + begin), tl.load(index + end - 1) + 1):
        own, after = tl.load(borders + sequence), tl.load(borders + sequence + 1)
        first, stop = tl.maximum(begin, own), tl.minimum(end, after)
        last = tl.minimum(stop + WIDTH - 1, after)
        window = _window(x, state, first, own, sequence, channel, mask, STRIDE, CHANNELS, WIDTH, STATE)
        x_at, dy_at = _row_at(x, first, channel, STRIDE), _row_at(dy, first, channel, DY_STRIDE)
        dx_at = _row_at(dx, first, channel, CHANNELS)
        coming = _load_rows(x_at, last - first, mask, STRIDE, TOGETHER)
        coming_grads = _load_rows(dy_at, last - first, mask, DY_STRIDE, TOGETHER)
        unfinished = ()
        for _ in tl.static_range(WIDTH):
            unfinished = unfinished + (zero,)
        # dx of a row is complete WIDTH - 1 rows later.
        for group in range(first, stop + WIDTH - 1, TOGETHER):
            later, later_grads = (), ()
            for i in tl.static_range(TOGETHER):
                row = group + i
                window = _shifted(coming[i].to(tl.float32), window, WIDTH)
                grad = coming_grads[i].to(tl.float32)
                inside = mask & (row + TOGETHER < last)
                later = later + (tl.load(x_at + (i + TOGETHER) * STRIDE, mask=inside, other=0),)
                later_grads = later_grads + (tl.load(dy_at + (i + TOGETHER) * DY_STRIDE, mask=inside, other=0),)
                ds = grad * _silu_gradient(_sum(taps, window, WIDTH))
                counted = tl.where(row < stop, ds, 0.0)
                unfinished = _shifted(zero, unfinished, WIDTH)
                new_unfinished, new_sums = (), ()
                for j in tl.static_range(WIDTH):
                    new_unfinished = new_unfinished + (unfinished[j] + taps[j] * ds,)
                    new_sums = new_sums + (sums[j] + counted * window[j],)
                unfinished, sums = new_unfinished, new_sums
                target = row - (WIDTH - 1)
                result = unfinished[WIDTH - 1].to(dx.dtype.element_ty)
                inside = mask & (target >= first) & (target < stop)
                tl.store(dx_at + (i - (WIDTH - 1)) * CHANNELS, result, mask=inside)
            coming, coming_grads = later, later_grads
            x_at += TOGETHER * STRIDE
            dy_at += TOGETHER * DY_STRIDE
            dx_at += TOGETHER * CHANNELS
    for i in tl.static_range(WIDTH):
        place = (number.to(tl.int64) * WIDTH + WIDTH - 1 - i) * CHANNELS + channel
        tl.store(dweight + place, sums[i], mask=mask)


@kernel
def _backward_last_rows(borders, dnew_state, dx, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The new state's gradient is added to that of the rows it consists of."""
    channel, number = _own_channels(CHANNELS, BLOCK)
    sequence = number.to(tl.int64)
    mask, history = channel < CHANNELS, sequence * (WIDTH - 1)
    begin, end = tl.load(borders + sequence).to(tl.int64), tl.load(borders + sequence + 1).to(tl.int64)
    for i in tl.static_range(WIDTH - 1):
        row = end - (WIDTH - 1) + i
        grad = tl.load(dnew_state + (history + i) * CHANNELS + channel, mask=mask, other=0).to(tl.float32)
        target = dx + row * CHANNELS + channel
        value = tl.load(target, mask=mask & (row >= begin), other=0).to(tl.float32) + grad
        tl.store(target, value.to(dx.dtype.element_ty), mask=mask & (row >= begin))


@kernel
def _backward_state(
    x, weight, state, borders, dy, dnew_state, dstate, stride, dy_stride,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PASSED: tl.constexpr,
):  # fmt: skip
    """The state's gradient: from the first WIDTH - 1 tokens, and where PASSED from what of it is in the new state."""
    channel, number = _own_channels(CHANNELS, BLOCK)
    sequence = number.to(tl.int64)
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
    def forward(
        ctx, x: Tensor, weight: Tensor, state: Tensor | None, sequences: Sequences, output_final_state: bool
    ):  # fmt: skip
        y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
        new_state = x.new_empty(sequences.count, weight.shape[1] - 1, x.shape[1]) if output_final_state else None
        blocks, spans, span, constants = _cut(x, weight, _FORWARD_PROGRAMS)
        conv1d_kernel[blocks * spans](
            x, weight, x if state is None else state, sequences.index, sequences.cu_seqlens, y, new_state,
            len(x), span, STRIDE=x.stride(0), **constants, STATE=state is not None,
            TOGETHER=_BYTES // x.element_size(),
        )  # fmt: skip
        ctx.sequences = sequences
        ctx.save_for_backward(x, weight, state)
        ctx.set_materialize_grads(False)
        return y, new_state

    @staticmethod
    def backward(ctx, dy: Tensor | None, dnew_state: Tensor | None):
        x, weight, state = ctx.saved_tensors
        sequences, held = ctx.sequences, x if state is None else state
        dy = torch.zeros_like(x) if dy is None else dense_rows(dy)
        dx, dstate = torch.empty(*x.shape, dtype=x.dtype, device=x.device), None
        blocks, spans, span, constants = _cut(x, weight, _BACKWARD_PROGRAMS)
        shares = torch.empty(spans, weight.shape[1], len(weight), dtype=torch.float32, device=x.device)
        borders = sequences.cu_seqlens
        conv1d_backward_kernel[blocks * spans](
            x, weight, held, sequences.index, borders, dy, dx, shares, len(x), span,
            STRIDE=x.stride(0), DY_STRIDE=dy.stride(0), **constants, STATE=state is not None,
            TOGETHER=_BYTES // x.element_size(),
        )  # fmt: skip
        dweight = sum_shares(shares, weight)
        passed = dnew_state is not None
        dnew_state = dnew_state.contiguous() if passed else dx
        if passed:
            _backward_last_rows[blocks * sequences.count](borders, dnew_state, dx, **constants)
        if state is not None and ctx.needs_input_grad[2]:
            dstate = torch.empty_like(state)
            _backward_state[blocks * sequences.count](
                x, weight, state, borders, dy, dnew_state, dstate, x.stride(0), dy.stride(0), **constants,
                PASSED=passed,
            )  # fmt: skip
        return dx, dweight, dstate, None, None


def _cut(x: Tensor, weight: Tensor, programs: int) -> tuple[int, int, int, dict[str, int]]:
    """Numbers of channel blocks and spans, tokens of a span, and constant arguments."""
    (tokens, channels), width = x.shape, weight.shape[1]
    block = min(_CHANNELS, next_power_of_2(channels))
    blocks = cdiv(channels, block)
    span = max(_SHORTEST_SPAN, cdiv(tokens, max(1, programs // blocks)))
    constants = {"CHANNELS": channels, "BLOCK": block, "WIDTH": width}
    return blocks, cdiv(tokens, span), span, constants | {"num_warps": max(1, block // (32 * _PER_THREAD))}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    sequences: Sequences,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `megahybrid_kernels.causal_conv1d`; float32, bfloat16 or float16."""
    state = None if initial_state is None else initial_state.contiguous()
    return applied(_Convolution, dense_rows(x), weight.contiguous(), state, sequences, output_final_state)
