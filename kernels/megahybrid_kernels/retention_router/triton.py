"""The retention router in Triton, forward and backward, a launch a layer.

A layer keeps its output before the activation, y `[kv_heads, tokens, channels_out]`; whoever reads it applies SiLU, so
that nothing else is stored. With taps tau, shifts s_tau = (tau - taps // 2) * dilation, dropout mask m and
x = SiLU(y of the layer before), or k and v side by side for the first, and with terms only within a document:

    y_t = bias + sum_tau W_tau (m x)_{t + s_tau} / (1 - p)
    dx_t = m_t / (1 - p) sum_tau W_tau^T dy_{t - s_tau}
    dW_tau = sum_t dy_t (m x)_{t + s_tau}^T / (1 - p)
    logit_t = <a, SiLU(y_t)> + c of the last layer, and so its dy_t = dlogit_t a SiLU'(y_t)

The mask is a hash (see `counter_dropout`) and computed again. With fp32 k and v, products are three tf32 ones, which is
nearly as exact as fp32. With k and v in half precision y is float16, as fine as tf32, and the forward multiplies in the
dtype of what it reads; dy has the dtype of k, whose range gradients may need, and the backward multiplies in that. All
else is fp32. Weights' gradients are summed in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.counter_dropout import fold
from megahybrid_kernels.integers import cdiv, next_power_of_2, tile_width
from megahybrid_kernels.retention_router.parameters import Dropout, RouterParameters
from megahybrid_kernels.retention_router.triton_copies import pack_weights, sum_splits
from megahybrid_kernels.retention_router.triton_layers import (
    backward_input_kernel,
    backward_projection_kernel,
    backward_weight_kernel,
    forward_layer_kernel,
)
from megahybrid_kernels.sequences import Sequences
from megahybrid_kernels.shares import sum_shares
from megahybrid_kernels.targets import AMPERE, BLACKWELL, table_of
from megahybrid_kernels.untracked import applied

_BLOCK = 64  # tokens of a program, at least
# Token ranges whose weight gradients are summed separately first.
_SPLITS = 16


@lru_cache(maxsize=64)
def _channel_keys(layer: int, offset: int, count: int, device: torch.device) -> Tensor:
    """int32 bits of each channel's part of the dropout hash."""
    return fold(layer, torch.arange(offset, offset + count, device=device)).to(torch.int32)


def _dtype_of_y(dtype: torch.dtype) -> torch.dtype:
    """Of the y of a layer whose input has `dtype`."""
    return torch.float32 if dtype == torch.float32 else torch.float16


@dataclass(frozen=True)
class _Layer:
    """One layer's sizes, and the launch arguments that its kernels share.

    Attributes:
        number: 0 for the first, which reads k and v as two halves of its channels.
        heads, halves, channels, taps, out: the packed weight is `[heads, taps, halves * channels, out]`.
        sequences, dilation: as of the op.
        keys, channel_keys: of dropout; unused ones without it.
        threshold, keep_scale: of dropout: the least hash that is kept, and 1 / (1 - p).
        drops: whether there is dropout.
        precision: of the products of fp32 operands.
    """

    number: int
    heads: int
    halves: int
    channels: int
    taps: int
    out: int
    sequences: Sequences
    dilation: int
    keys: Tensor
    channel_keys: Tensor
    threshold: int
    keep_scale: float
    drops: bool
    precision: str

    @classmethod
    def of(
        cls,
        number: int,
        parameters: RouterParameters,
        sequences: Sequences,
        dropout: Dropout | None,
        dilation: int,
        dtype: torch.dtype,
    ) -> _Layer:
        """Layer `number`, counted from 0, for k and v of `dtype`."""
        weight, heads, halves = parameters.weights[number], parameters.projection.shape[0], 1 if number else 2
        drops = dropout is not None and dropout.probability > 0
        precision = table_of(weight.device).precise if dtype == torch.float32 else "tf32"
        keys, channel_keys, threshold, keep_scale = sequences.begins, sequences.begins, 0, 1.0
        if drops:
            offset = dropout.channel_offset * weight.shape[1] // parameters.weights[0].shape[1]
            keys, keep_scale = dropout.keys.contiguous(), 1 / (1 - dropout.probability)
            channel_keys = _channel_keys(number, offset, heads * weight.shape[1], keys.device)
            threshold = min(round(dropout.probability * (1 << 32)), 0xFFFFFFFF)
        return cls(
            number, heads, halves, weight.shape[1] // halves, weight.shape[2], weight.shape[0] // heads, sequences,
            dilation, keys, channel_keys, threshold, keep_scale, drops, precision,
        )  # fmt: skip

    @property
    def constants(self) -> dict[str, object]:
        """constexpr arguments of all kernels."""
        sizes = {"CHANNELS": self.channels, "WIDTH": tile_width(self.channels), "OUT": self.out, "TAPS": self.taps}
        flags = {"ACTIVATE": self.number > 0, "DROPOUT": self.drops, "HALVES": self.halves}
        return sizes | flags | {"OUT_WIDTH": tile_width(self.out), "PRECISION": self.precision}

    @property
    def places(self) -> tuple[Tensor, ...]:
        """Dropout's keys and the borders of documents."""
        return self.keys, self.channel_keys, self.sequences.begins, self.sequences.ends

    def strides(self, x: Tensor) -> tuple[int, int]:
        """Of tokens and heads: y is `[heads, tokens, channels]`, k and v `[tokens, heads, channels]`."""
        return (x.stride(1), x.stride(0)) if self.number else (x.stride(0), x.stride(1))

    @property
    def warps(self) -> int:
        """Of the kernels that hold a row's products: two tiles of them should stay in registers."""
        return 8 if max(self.channels, self.out) > 64 else 4

    def weight_launch(self, dtype: torch.dtype) -> tuple[bool, int, int, int]:
        """Of the weight's gradient: whether it takes all taps at once, tokens of a step, num_warps and num_stages."""
        small = tile_width(self.channels) * tile_width(self.out) <= 64 * 64
        if dtype == torch.float32:
            return small and self.taps == 3, 32, 4 if small else 8, 1
        # Triton cannot load a step ahead of products in tensor memory here.
        stages = 1 if table_of(self.keys.device) is BLACKWELL else 2
        return small and self.taps == 3, 128 if small else 32, 4 if small else 8, stages

    def forward(
        self, inputs: tuple[Tensor, ...], packed, bias, projection, projection_bias, logits: Tensor | None, scored: bool
    ):
        """y from (k, v) or from the last y, and the packed weight; logits, or scores, are written if given."""
        tokens = self.sequences.tokens
        y = torch.empty(self.heads, tokens, self.out, dtype=_dtype_of_y(inputs[0].dtype), device=packed.device)
        first, second = inputs[0], inputs[-1]
        halo = self.taps // 2 * self.dilation
        block = max(_BLOCK, next_power_of_2(4 * halo))
        # As many as there are: without a cap ptxas gives a thread 32 for sm_80.
        cap = {"maxnreg": 255} if self.warps > 4 and table_of(packed.device) is AMPERE else {}
        forward_layer_kernel[cdiv(tokens, block - 2 * halo) * self.heads](
            first, second, packed, bias, *self.places, y, projection, projection_bias,
            y if logits is None else logits, *self.strides(first), *self.strides(second), tokens, self.dilation,
            self.threshold, self.keep_scale, **self.constants, LAST=logits is not None,
            SCORES=scored and logits is not None, BLOCK=block, num_warps=self.warps, **cap,
        )  # fmt: skip
        return y

    def backward(self, inputs: tuple[Tensor, ...], packed: Tensor, dy: Tensor, before: tuple[Tensor | None, ...]):
        """Gradients of the inputs (for a y of what comes before its activation), of which k and v have some `before`;
        and what `sum_splits` takes."""
        tokens, heads = self.sequences.tokens, self.heads
        together, block, warps, stages = self.weight_launch(dy.dtype)
        span = cdiv(cdiv(tokens, _SPLITS), block) * block
        splits = cdiv(tokens, span)
        dweight, dbias = (
            torch.empty(splits, heads, *shape, dtype=torch.float32, device=dy.device)
            for shape in ((self.taps, self.halves * self.channels, self.out), (self.out,))
        )
        scalars = (tokens, self.dilation, self.threshold, self.keep_scale)
        gradients = [torch.empty(*x.shape, dtype=dy.dtype, device=x.device) for x in inputs]
        backward_input_kernel[cdiv(tokens, _BLOCK) * heads](
            dy, packed, inputs[0], *before, gradients[0], gradients[-1], *self.places, *self.strides(gradients[0]),
            *scalars, **self.constants, BLOCK=_BLOCK, num_warps=self.warps,
        )  # fmt: skip
        backward_weight_kernel[self.halves * (1 if together else self.taps) * splits * heads](
            dy, inputs[0], inputs[-1], dweight, dbias, *self.places, *self.strides(inputs[0]),
            *self.strides(inputs[-1]), tokens, span, *scalars[1:], **self.constants, BLOCK=block, TOGETHER=together,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return gradients, (dweight, dbias)


def forward_layers(
    layers: list[_Layer],
    logits: Tensor,
    scored: bool,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    projection_bias: Tensor,
    *rest: Tensor,
) -> list[Tensor]:
    """Every layer's y; fills logits, fp32 `[tokens, kv_heads]`, or if `scored` with scores. `rest` are the weights and
    then the biases."""
    weights, biases = rest[: len(layers)], rest[len(layers) :]
    dtypes = [k.dtype] + [_dtype_of_y(k.dtype)] * (len(layers) - 1)
    packed = pack_weights(list(weights), layers[0].heads, dtypes)
    inputs, ys = (k, v), []
    for layer, weight, bias in zip(layers, packed, biases, strict=True):
        out = logits if layer is layers[-1] else None
        ys.append(layer.forward(inputs, weight, bias, projection, projection_bias, out, scored))
        inputs = (ys[-1],)
    return ys


class _Router(torch.autograd.Function):
    """Scores, and k and v, whose gradients from all other uses come in one with its own. Saves k, v, the weights, every
    layer's y and the scores; without `scored` there are logits in their place."""

    @staticmethod
    def forward(
        ctx,
        scored: bool,
        layers: list[_Layer],
        k: Tensor,
        v: Tensor,
        projection: Tensor,
        projection_bias: Tensor,
        *rest: Tensor,
    ):
        weights = rest[: len(layers)]
        scores = torch.empty(*k.shape[:2], dtype=torch.float32, device=k.device)
        ys = forward_layers(layers, scores, scored, k, v, projection, projection_bias, *rest)
        ctx.layers = layers
        ctx.save_for_backward(k, v, projection, projection_bias, scores if scored else None, *weights, *ys)
        ctx.set_materialize_grads(False)
        return scores, k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, dscores: Tensor | None, *before: Tensor | None):
        k, v, projection, projection_bias, scores, *rest = ctx.saved_tensors
        layers, count = ctx.layers, len(ctx.layers)
        weights, ys = rest[:count], rest[count:]
        if dscores is None:
            return None, None, *before, *[None] * (2 + 2 * count)
        before = tuple(x if x is None else x.contiguous() for x in before)
        dscores, tokens = dscores.contiguous(), k.shape[0]
        last, blocks = layers[-1], cdiv(tokens, _BLOCK)
        dy = torch.empty(*ys[-1].shape, dtype=k.dtype, device=k.device)
        dprojection, dbias = (
            torch.empty(blocks, last.heads * out, dtype=torch.float32, device=k.device) for out in (last.out, 1)
        )
        backward_projection_kernel[blocks * last.heads](
            ys[-1], scores, dscores, projection, dy, dprojection, dbias, tokens, OUT=last.out,
            OUT_WIDTH=tile_width(last.out), BLOCK=_BLOCK,
        )  # fmt: skip
        packed, splits = pack_weights(weights, last.heads, [dy.dtype] * count), []
        for number in reversed(range(count)):
            inputs, others = ((ys[number - 1],), (None, None)) if number else ((k, v), before)
            gradients, sums = layers[number].backward(inputs, packed[number], dy, others)
            dy = gradients[0]
            splits.insert(0, sums)
        dweights, dbiases = sum_splits(weights, last.heads, splits)
        dprojection = sum_shares(dprojection, projection.view(-1)).view_as(projection)
        return None, None, *gradients, dprojection, sum_shares(dbias, projection_bias), *dweights, *dbiases


def retention_logits(
    k: Tensor,
    v: Tensor,
    parameters: RouterParameters,
    sequences: Sequences,
    dropout: Dropout | None = None,
    dilation: int = 2,
) -> Tensor:
    """See `megahybrid_kernels.retention_router.retention_logits`; float32, bfloat16 or float16."""
    return applied(_Router, False, *router_arguments(k, v, parameters, sequences, dropout, dilation))[0]


def retention_scores(
    k: Tensor,
    v: Tensor,
    parameters: RouterParameters,
    sequences: Sequences,
    dropout: Dropout | None = None,
    dilation: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megahybrid_kernels.retention_router.retention_scores`; likewise."""
    return applied(_Router, True, *router_arguments(k, v, parameters, sequences, dropout, dilation))


def router_arguments(
    k: Tensor, v: Tensor, parameters: RouterParameters, sequences: Sequences, dropout: Dropout | None, dilation: int
) -> tuple:
    """Those of `forward_layers`, but for the logits."""
    k, v = map(dense_rows, (k, v))
    weights, biases, projection, projection_bias = parameters
    layers = [_Layer.of(n, parameters, sequences, dropout, dilation, k.dtype) for n in range(len(weights))]
    biases = (bias.contiguous() for bias in biases)
    return layers, k, v, projection.contiguous(), projection_bias.contiguous(), *weights, *biases
