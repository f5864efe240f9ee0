"""The ops that a recipe's model uses, at the shapes that a rank has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch

from megahybrid.config.key import derived
from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import Config, ModelConfig
from megahybrid_kernels.judging import shapes
from megahybrid_kernels.judging.sizes import CHECKED, SIZES, Size
from megahybrid_kernels.retention_router import margin

# What PyTorch computes the same of any number of them, and in less time of few.
_MOST_ON_A_CPU = {"heads": 2, "groups": 1, "channels": 256, "hidden": 1024, "intermediate": 1408, "vocabulary": 1408}


def size_of(config: Config | None, device: torch.device) -> Size:
    """A thousand tokens at all shapes, or those of a rank of `config`; of few heads and channels without a GPU, where
    kernels are not what is run."""
    if config is None:
        return SIZES["check"]
    model, ranks = derived(config.model), config.parallel.tensor
    used = [
        shapes.RMSNorm(model.hidden_size),
        shapes.SwiGLU(model.intermediate_size // ranks),
        shapes.LinearCrossEntropy(model.hidden_size, model.vocab_size // ranks),
    ]
    for letter in dict.fromkeys(parse_pattern(model.pattern).letters):
        used += OPS[letter](model, ranks)
    return Size(CHECKED, tuple(dict.fromkeys(used if device.type == "cuda" else map(_small, used))))


def _small(shape: shapes.Shape) -> shapes.Shape:
    most = {each.name: _MOST_ON_A_CPU[each.name] for each in fields(shape) if each.name in _MOST_ON_A_CPU}
    return replace(shape, **{name: min(getattr(shape, name), limit) for name, limit in most.items()})


def _gated_deltanet(model: ModelConfig, ranks: int) -> list[shapes.Shape]:
    heads, key_dim, value_dim = model.gdn.num_heads // ranks, model.gdn.head_dim, model.gdn.value_head_dim
    taps, convolutions = model.gdn.conv_size, [shapes.CausalConv1d(heads * key_dim, model.gdn.conv_size)]
    if value_dim != key_dim:
        convolutions += [shapes.CausalConv1d(heads * value_dim, taps, "values")]
    return [shapes.GatedDeltaRule(heads, key_dim, value_dim), *convolutions, shapes.GatedRMSNorm(heads, value_dim)]


def _attention(model: ModelConfig, ranks: int, window: int | None) -> list[shapes.Shape]:
    heads, groups, head_dim = _heads(model, ranks)
    return [shapes.Attention(heads, head_dim, groups, window), shapes.Rotary(heads * groups, head_dim)]


def _eviction(model: ModelConfig, ranks: int) -> list[shapes.Shape]:
    (heads, groups, head_dim), lte = _heads(model, ranks), model.lte
    limits = {"window": lte.window_size, "buffer": lte.buffer_size, "sinks": lte.sink_size}
    return [
        shapes.LTEAttention(heads, head_dim, groups, **limits, delay=margin(lte.conv_size, lte.conv_dilation)),
        shapes.ExitPositions(heads, **limits),
        shapes.RetentionRouter(heads, head_dim, lte.conv_size, lte.conv_dilation),
        shapes.Rotary(heads * groups, head_dim),
    ]


def _heads(model: ModelConfig, ranks: int) -> tuple[int, int, int]:
    attention = model.attention
    return attention.num_kv_heads // ranks, attention.num_heads // attention.num_kv_heads, attention.head_dim


OPS: dict[str, Callable[[ModelConfig, int], list[shapes.Shape]]] = {
    "G": _gated_deltanet,
    "L": _eviction,
    "S": lambda model, ranks: _attention(model, ranks, model.attention.window_size),
    "F": lambda model, ranks: _attention(model, ranks, None),
}
"""What a layer of each letter calls, on one of so many tensor parallel ranks."""
