"""What a retention router works with: its weights, its dropout, and its state while it is streamed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megahybrid_kernels.precision import accumulator


class RouterParameters(NamedTuple):
    """Weights of one independent router per KV head, laid out head-major as those of a grouped Conv1d.

    Attributes:
        weights: `[kv_heads * channels_out, channels_in, kernel_size]` for each convolution.
        biases: `[kv_heads * channels_out]` for each convolution.
        projection: `[kv_heads, channels]`, from the last convolution's channels to a logit.
        projection_bias: `[kv_heads]`.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    projection: Tensor
    projection_bias: Tensor


class Dropout(NamedTuple):
    """Counter-based dropout before each convolution.

    Attributes:
        probability: of dropping an element.
        keys: int64 `[tokens]`, 32 bits each, unique per (seed, step, layer, sample, position); see `fold`.
        channel_offset: KV heads before this rank's first one, times 2 * head_dim: where its input channels begin. Later
            layers, whose heads have fewer channels, scale it down.
    """

    probability: float
    keys: Tensor
    channel_offset: int = 0


class RouterState(NamedTuple):
    """The last inputs of each convolution: `[sequences, (kernel_size - 1) * dilation, kv_heads, channels_in]`."""

    rows: tuple[Tensor, ...]

    @classmethod
    def empty(cls, count: int, parameters: RouterParameters, dilation: int = 2) -> RouterState:
        """State of `count` sequences that have not begun."""
        heads = parameters.projection.shape[0]

        def rows(weight: Tensor) -> Tensor:
            sizes = count, (weight.shape[2] - 1) * dilation, heads, weight.shape[1]
            return weight.new_zeros(sizes, dtype=accumulator(weight.dtype))

        return cls(tuple(map(rows, parameters.weights)))


def margin(kernel_size: int, dilation: int) -> int:
    """Tokens of right context that a score needs, and so by which it is late when streamed."""
    return 3 * ((kernel_size - 1) // 2) * dilation
