"""The ops that a recipe's model uses, at the shapes that a rank has."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import Config
from megahybrid.config.validate import keepers
from megahybrid.key import derived
from megahybrid.mixers import KINDS
from megahybrid_kernels.judging import shapes
from megahybrid_kernels.judging.sizes import CHECKED, SIZES, Size

# What PyTorch computes the same of any number of them, and in less time of few.
_MOST_ON_A_CPU = {
    "heads": 2,
    "groups": 1,
    "channels": 256,
    "whole": 320,
    "hidden": 1024,
    "intermediate": 1408,
    "vocabulary": 1408,
}


def size_of(config: Config | None, device: torch.device) -> Size:
    """A thousand tokens at all shapes, or those of a rank of `config`; of few heads and channels without a GPU, where
    kernels are not what is run."""
    if config is None:
        return SIZES["check"]
    model, ranks = derived(config.model), config.parallel.tensor
    keeping = keepers(config)
    letters = parse_pattern(model.pattern).letters
    used = [
        shapes.DropoutKeys(len(letters)),
        shapes.RMSNorm(model.hidden_size),
        shapes.SwiGLU(model.intermediate_size // ranks),
        shapes.RowProducts(model.hidden_size, model.intermediate_size // ranks),
        shapes.LinearCrossEntropy(model.hidden_size, model.vocab_size // ranks),
    ]
    for letter in dict.fromkeys(letters):
        used += KINDS[letter].judged(model, ranks * (1 if letter in keeping else config.parallel.context))
    return Size(CHECKED, tuple(dict.fromkeys(used if device.type == "cuda" else map(_small, used))))


def _small(shape: shapes.Shape) -> shapes.Shape:
    most = {each.name: _MOST_ON_A_CPU[each.name] for each in fields(shape) if each.name in _MOST_ON_A_CPU}
    return replace(shape, **{name: min(getattr(shape, name), limit) for name, limit in most.items()})
