"""Floating-point operations of a model, counted from what each part has to compute.

A multiplication and an addition are two. Counted are matrix products and convolutions; norms, activations, rotary
embedding, softmax and look-ups, together about 1 %, are not. What a kernel does beyond need (masked
halves of tiles, recomputation) is not counted either, so that a faster kernel shows as a higher utilisation (MFU).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import Config, ModelConfig
from megahybrid.key import derived
from megahybrid.mixers import KINDS
from megahybrid.mixers.counting import linear


@dataclass(frozen=True)
class Flops:
    """FLOPs a token, averaged over the positions of documents.

    Attributes:
        parts: of the forward pass, by part of the model over all its layers.
    """

    parts: dict[str, float]

    @property
    def forward(self) -> float:
        """Of the forward pass."""
        return sum(self.parts.values())

    @property
    def training(self) -> float:
        """Of forward and backward pass: every product's backward is two products of its size, one for each factor."""
        return 3 * self.forward


def flops_per_token(config: Config, lengths: Mapping[int, float] | None = None) -> Flops:
    """FLOPs a token of the model that the configuration describes.

    Args:
        config: of the model, and train.seq_length.
        lengths: which part of the tokens is in documents of which length, as `megahybrid.data.lengths` finds them; all
            in such of train.seq_length when left out.
    """
    model = derived(config.model)
    parts: Counter[str] = Counter()
    for letter, layers in Counter(parse_pattern(model.pattern).letters).items():
        for length, part in (lengths or {config.train.seq_length: 1}).items():
            parts.update({name: layers * part * flops for name, flops in layer(model, letter, length).items()})
    parts["output layer"] = linear(model.hidden_size, model.vocab_size)
    return Flops(dict(parts))


def layer(model: ModelConfig, letter: str, length: int) -> dict[str, float]:
    """A layer of the pattern in a model whose configuration is derived: its mixer's parts and its SwiGLU."""
    kind = KINDS[letter]
    parts = {f"{kind.title}: {name}": count for name, count in kind.flops(model, length).items()}
    return parts | {"SwiGLU": linear(model.hidden_size, 3 * model.intermediate_size)}
