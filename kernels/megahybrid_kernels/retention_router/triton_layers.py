"""Kernels of the retention router, a launch a layer and direction; `triton.py` has the equations."""

from __future__ import annotations

import triton
import triton.language as tl

from megahybrid_kernels.activations import silu, silu_slope
from megahybrid_kernels.counter_dropout.triton import mix
from megahybrid_kernels.launch import kernel


@triton.jit
def _keep(keys, channel_keys, threshold):
    """`counter_dropout.keep_mask` of tokens by channels."""
    x = keys.to(tl.uint32)[:, None] ^ channel_keys.to(tl.uint32)[None, :]
    return mix(x) >= threshold.to(tl.uint32)


@triton.jit
def _layer_input(
    x, row, inside, stride, keys, channel_keys, threshold,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ACTIVATE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """What a layer multiplies, `[rows, WIDTH]`, but for dropout's factor 1 / (1 - p); zero where not inside."""
    channel = tl.arange(0, WIDTH)
    mask = inside[:, None] & (channel < CHANNELS)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * stride + channel[None, :], mask=mask, other=0)
    if ACTIVATE:
        value = silu(value.to(tl.float32))
    if DROPOUT:
        token_keys = tl.load(keys + row, mask=inside, other=0)
        channel_key = tl.load(channel_keys + channel, mask=channel < CHANNELS, other=0)
        value = tl.where(_keep(token_keys, channel_key, threshold), value, 0)
    return value


@kernel
def forward_layer_kernel(
    first, second, weight, bias, keys, channel_keys, begins, ends, y, projection, projection_bias, logits,
    stride, head_stride, second_stride, second_head_stride, tokens, dilation, threshold, keep_scale,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, HALVES: tl.constexpr,
    TAPS: tl.constexpr, ACTIVATE: tl.constexpr, DROPOUT: tl.constexpr, LAST: tl.constexpr, SCORES: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a layer, and the logits of the last, or with SCORES its scores. weight: `[kv_heads, TAPS, HALVES * CHANNELS,
    OUT]`.

    A program multiplies BLOCK rows by the weights of all taps and then shifts the products, so that each input is read,
    activated and dropped once; its first and last `TAPS // 2 * dilation` rows serve the others only.
    """
    halo = TAPS // 2 * dilation
    blocks = tl.cdiv(tokens, BLOCK - 2 * halo)
    head, heads = (tl.program_id(0) // blocks).to(tl.int64), tl.num_programs(0) // blocks
    lane = tl.arange(0, BLOCK)
    row = tl.program_id(0) % blocks * (BLOCK - 2 * halo) - halo + lane
    exists = (row >= 0) & (row < tokens)
    numbers = channel_keys + head * HALVES * CHANNELS
    value = _layer_input(
        first + head * head_stride, row, exists, stride, keys, numbers, threshold, CHANNELS, WIDTH, ACTIVATE, DROPOUT
    )
    if HALVES == 2:
        other_value = _layer_input(
            second + head * second_head_stride, row, exists, second_stride, keys, numbers + CHANNELS, threshold,
            CHANNELS, WIDTH, ACTIVATE, DROPOUT,
        )  # fmt: skip
    begin = tl.load(begins + row, mask=exists, other=0)
    end = tl.load(ends + row, mask=exists, other=0)
    channel, out = tl.arange(0, WIDTH), tl.arange(0, OUT_WIDTH)
    weight_mask = (channel < CHANNELS)[:, None] & (out < OUT)[None, :]
    acc = tl.zeros([BLOCK, OUT_WIDTH], tl.float32)
    for tap in tl.static_range(TAPS):
        places = ((head * TAPS + tap) * HALVES * CHANNELS + channel)[:, None] * OUT + out[None, :]
        matrix = tl.load(weight + places, mask=weight_mask, other=0)
        product = tl.dot(value.to(matrix.dtype), matrix, input_precision=PRECISION)
        if HALVES == 2:
            matrix = tl.load(weight + places + CHANNELS * OUT, mask=weight_mask, other=0)
            product = tl.dot(other_value.to(matrix.dtype), matrix, product, input_precision=PRECISION)
        shift = (tap - TAPS // 2) * dilation
        if tap != TAPS // 2:
            source = tl.minimum(tl.maximum(lane + shift, 0), BLOCK - 1)
            product = tl.gather(product, tl.broadcast_to(source[:, None], [BLOCK, OUT_WIDTH]), 0)
        inside = (row + shift >= begin) & (row + shift < end)
        acc += tl.where(inside[:, None], product, 0)
    exists = exists & (lane >= halo) & (lane < BLOCK - halo)
    if DROPOUT:
        acc *= keep_scale
    acc += tl.load(bias + head * OUT + out, mask=out < OUT, other=0).to(tl.float32)[None, :]
    mask = exists[:, None] & (out < OUT)[None, :]
    # Within what float16 holds.
    stored = tl.minimum(tl.maximum(acc, -65000.0), 65000.0) if y.dtype.element_ty == tl.float16 else acc
    tl.store(y + (head * tokens + row)[:, None] * OUT + out[None, :], stored.to(y.dtype.element_ty), mask=mask)
    if LAST:
        vector = tl.load(projection + head * OUT + out, mask=out < OUT, other=0).to(tl.float32)
        logit = tl.sum(silu(acc) * vector[None, :], 1)
        logit += tl.load(projection_bias + head).to(tl.float32)
        if SCORES:
            logit = tl.sigmoid(logit) - 0.5
        tl.store(logits + row.to(tl.int64) * heads + head, logit, mask=exists)


@kernel
def backward_projection_kernel(
    y, scores, dlogits, projection, dy, dprojection, dbias, tokens, OUT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dy of the last layer; sums for each block of tokens, dprojection `[blocks, kv_heads, OUT]` and dbias `[blocks,
    kv_heads]`. With scores unless None, dlogits is their gradient."""
    blocks = tl.cdiv(tokens, BLOCK)
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    heads = tl.num_programs(0) // blocks
    row = block * BLOCK + tl.arange(0, BLOCK)
    out = tl.arange(0, OUT_WIDTH)
    mask = (row < tokens)[:, None] & (out < OUT)[None, :]
    places = (head * tokens + row)[:, None] * OUT + out[None, :]
    value = tl.load(y + places, mask=mask, other=0).to(tl.float32)
    grad = tl.load(dlogits + row.to(tl.int64) * heads + head, mask=row < tokens, other=0).to(tl.float32)
    if scores is not None:
        score = tl.load(scores + row.to(tl.int64) * heads + head, mask=row < tokens, other=0)
        grad *= 0.25 - score * score  # the sigmoid's slope, s (1 - s) with s = score + 1/2
    vector = tl.load(projection + head * OUT + out, mask=out < OUT, other=0).to(tl.float32)
    dvalue = grad[:, None] * vector[None, :] * silu_slope(value, tl.sigmoid(value))
    tl.store(dy + places, dvalue.to(dy.dtype.element_ty), mask=mask)
    sums = tl.sum(grad[:, None] * value * tl.sigmoid(value), 0)
    place = block.to(tl.int64) * heads + head
    tl.store(dprojection + place * OUT + out, sums, mask=out < OUT)
    tl.store(dbias + place, tl.sum(grad, 0))


@kernel
def backward_input_kernel(
    dy, weight, y, first_before, second_before, first, second, keys, channel_keys, begins, ends, stride, head_stride,
    tokens, dilation, threshold, keep_scale,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, HALVES: tl.constexpr,
    TAPS: tl.constexpr, ACTIVATE: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the first layer's halves (dk and dv, alike in strides), added to those before unless None; or with
    ACTIVATE dy of the layer before from its y, into `first`."""
    blocks = tl.cdiv(tokens, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = row < tokens
    begin = tl.load(begins + row, mask=exists, other=0)
    end = tl.load(ends + row, mask=exists, other=0)
    channel, out = tl.arange(0, WIDTH), tl.arange(0, OUT_WIDTH)
    weight_mask = (channel < CHANNELS)[:, None] & (out < OUT)[None, :]
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    other_acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    for tap in tl.static_range(TAPS):
        other = row - (tap - TAPS // 2) * dilation
        grad = _rows(dy + head * tokens * OUT, other, begin, end, OUT, OUT_WIDTH)
        places = ((head * TAPS + tap) * HALVES * CHANNELS + channel)[:, None] * OUT + out[None, :]
        matrix = tl.load(weight + places, mask=weight_mask, other=0)
        acc = tl.dot(grad.to(matrix.dtype), tl.trans(matrix), acc, input_precision=PRECISION)
        if HALVES == 2:
            matrix = tl.load(weight + places + CHANNELS * OUT, mask=weight_mask, other=0)
            other_acc = tl.dot(grad.to(matrix.dtype), tl.trans(matrix), other_acc, input_precision=PRECISION)
    mask = exists[:, None] & (channel < CHANNELS)[None, :]
    places = head * head_stride + row.to(tl.int64)[:, None] * stride + channel[None, :]
    numbers = channel_keys + head * HALVES * CHANNELS
    if ACTIVATE:
        before = tl.load(y + places, mask=mask, other=0).to(tl.float32)
        acc *= silu_slope(before, tl.sigmoid(before))
    _store_input_gradient(
        acc, first, first_before, places, mask, keys, numbers, row, exists, threshold, keep_scale, CHANNELS, WIDTH,
        DROPOUT,
    )  # fmt: skip
    if HALVES == 2:
        _store_input_gradient(
            other_acc, second, second_before, places, mask, keys, numbers + CHANNELS, row, exists, threshold,
            keep_scale, CHANNELS, WIDTH, DROPOUT,
        )  # fmt: skip


@triton.jit
def _store_input_gradient(
    value, target, before, places, mask, keys, channel_keys, row, exists, threshold, keep_scale,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """What dropout leaves of a value, and what there is before unless None."""
    if DROPOUT:
        channel = tl.arange(0, WIDTH)
        token_keys = tl.load(keys + row, mask=exists, other=0)
        channel_key = tl.load(channel_keys + channel, mask=channel < CHANNELS, other=0)
        value = tl.where(_keep(token_keys, channel_key, threshold), value * keep_scale, 0)
    if before is not None:
        value += tl.load(before + places, mask=mask, other=0).to(tl.float32)
    tl.store(target + places, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _rows(x, row, begin, end, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """`[rows, WIDTH]` of an array of `[.., SIZE]`; zero for rows outside of [begin, end)."""
    column = tl.arange(0, WIDTH)
    mask = ((row >= begin) & (row < end))[:, None] & (column < SIZE)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * SIZE + column[None, :], mask=mask, other=0)


@kernel
def backward_weight_kernel(
    dy, first, second, dweight, dbias, keys, channel_keys, begins, ends, stride, head_stride, second_stride,
    second_head_stride, tokens, span, dilation, threshold, keep_scale,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, HALVES: tl.constexpr,
    TAPS: tl.constexpr, ACTIVATE: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dW of one half over `span` tokens, of three taps at once if TOGETHER, else of one; and the bias's gradient.

    dweight: `[splits, kv_heads, TAPS, HALVES * CHANNELS, OUT]`; dbias: `[splits, kv_heads, OUT]`.
    """
    parts: tl.constexpr = HALVES if TOGETHER else HALVES * TAPS
    splits = tl.cdiv(tokens, span)
    tap, half = tl.program_id(0) % parts // HALVES, tl.program_id(0) % HALVES
    split, head = tl.program_id(0) // parts % splits, (tl.program_id(0) // parts // splits).to(tl.int64)
    heads = tl.num_programs(0) // parts // splits
    channel, out = tl.arange(0, WIDTH), tl.arange(0, OUT_WIDTH)
    x, x_stride = first + head * head_stride, stride
    if half == 1:
        x, x_stride = second + head * second_head_stride, second_stride
    dy += head * tokens * OUT
    numbers = channel_keys + (head * HALVES + half) * CHANNELS
    shift = dilation if TOGETHER else (tap - TAPS // 2) * dilation
    acc = tl.zeros([WIDTH, OUT_WIDTH], tl.float32)
    before, after = acc, acc
    bias = tl.zeros([OUT_WIDTH], tl.float32)
    for start in tl.range(split * span, tl.minimum((split + 1) * span, tokens), BLOCK):
        row = start + tl.arange(0, BLOCK)
        exists = row < tokens
        begin = tl.load(begins + row, mask=exists, other=0)
        end = tl.load(ends + row, mask=exists, other=0)
        value = _layer_input(x, row, exists, x_stride, keys, numbers, threshold, CHANNELS, WIDTH, ACTIVATE, DROPOUT)
        turned = tl.trans(value.to(dy.dtype.element_ty))
        if TOGETHER:
            later = _rows(dy, row + shift, begin, end, OUT, OUT_WIDTH)
            before = tl.dot(turned, later, before, input_precision=PRECISION)
            grad = _rows(dy, row, begin, end, OUT, OUT_WIDTH)
            acc = tl.dot(turned, grad, acc, input_precision=PRECISION)
            earlier = _rows(dy, row - shift, begin, end, OUT, OUT_WIDTH)
            after = tl.dot(turned, earlier, after, input_precision=PRECISION)
        else:
            grad = _rows(dy, row - shift, begin, end, OUT, OUT_WIDTH)
            acc = tl.dot(turned, grad, acc, input_precision=PRECISION)
        bias += tl.sum(grad.to(tl.float32), 0)
    sums = dweight + ((split * heads + head) * TAPS * HALVES + half) * CHANNELS * OUT
    sums += channel[:, None] * OUT + out[None, :]
    mask = (channel < CHANNELS)[:, None] & (out < OUT)[None, :]
    each = HALVES * CHANNELS * OUT
    scale = keep_scale if DROPOUT else 1.0
    if TOGETHER:
        tl.store(sums, before * scale, mask=mask)
        tl.store(sums + each, acc * scale, mask=mask)
        tl.store(sums + 2 * each, after * scale, mask=mask)
    else:
        tl.store(sums + tap * each, acc * scale, mask=mask)
    # The tap without a shift sees every row once.
    own = (half == 0) & (TOGETHER | (tap == TAPS // 2))
    tl.store(dbias + (split * heads + head) * OUT + out, bias, mask=(out < OUT) & own)
