"""Weights of one input side by side in memory, for models that are not trained: one product takes them all.

Each stays a parameter of its own, a view of the whole, so that names and shapes are as before. The exported model's
files, which cannot import this package, have the same idea once more, in hf/layers_megahybrid.py, for weights that may
be trained and replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megahybrid.parallel.layers import ColumnLinear, Joined

# Rows of a whole are a multiple of it, so that those of a product begin at multiples of 128 bytes.
_ROWS = 64


def join_weights(model: nn.Module) -> None:
    """Join every module's column-split projections, and the parameters that it names in `beside`; the last thing that
    happens to a model's weights before inference: others that take their place later are not joined."""
    for module in model.modules():
        layers = [child for child in module.children() if isinstance(child, ColumnLinear)]
        if len(layers) > 1:
            weights = [layer.weight for layer in layers]
            whole, places = _side_by_side(weights), [weight.data_ptr() for weight in weights]
            sizes = list(map(len, weights))
            layers[0].joined = Joined(tuple(layers), whole, [*sizes, len(whole) - sum(sizes)], places)
        if names := getattr(module, "beside", ()):
            _side_by_side([getattr(module, name) for name in names])


def rows_of_whole(rows: int) -> int:
    """Of a whole that holds weights of so many rows; a product with it has as many columns."""
    return -(-rows // _ROWS) * _ROWS


@torch.no_grad()
def _side_by_side(weights: Sequence[nn.Parameter]) -> Tensor:
    """`[rows, …]`: all weights' rows, in memory of which they are views from now on, and rows of 0."""
    whole = weights[0].new_zeros(rows_of_whole(sum(map(len, weights))), *weights[0].shape[1:])
    first = 0
    for weight in weights:
        part = whole[first : first + len(weight)]
        weight.data = part.copy_(weight)
        first += len(weight)
    return whole


def together(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat`, without gradients for nothing where the parts lie beside each other in memory."""
    if torch.is_grad_enabled():
        return torch.cat(tuple(parts), dim)
    first, at = parts[0], parts[0].storage_offset()
    memory, strides = first.untyped_storage()._cdata, first.stride()
    for part in parts:
        if part.untyped_storage()._cdata != memory or part.storage_offset() != at or part.stride() != strides:
            return torch.cat(tuple(parts), dim)
        at += part.shape[dim] * strides[dim]
    sizes = list(first.shape)
    sizes[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(sizes, strides)
