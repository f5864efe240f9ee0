"""What the layers are built from: the model's configuration with everything derived from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from megahybrid.config.pattern import Pattern, parse_pattern
from megahybrid.config.schema import Config, ModelConfig
from megahybrid.key import derived
from megahybrid.parallel.parameters import Initializer, normal


@dataclass(frozen=True)
class Settings:
    """The architecture as its layers need it.

    Attributes:
        model: the configuration, with what is left out derived.
        pattern: the parsed layer pattern.
        intermediate_size: width inside the SwiGLU.
        kv_heads: key-value heads of attention layers.
        sequence_parallel: whether the residual stream is split over the tensor parallel ranks.
        recompute: letters of the layers that recompute their activations in the backward pass.
    """

    model: ModelConfig
    pattern: Pattern
    intermediate_size: int
    kv_heads: int
    sequence_parallel: bool
    recompute: str

    @classmethod
    def of(cls, config: Config) -> Settings:
        """Derive the settings from a validated configuration."""
        model, pattern = derived(config.model), parse_pattern(config.model.pattern)
        recompute = {"none": "", "all": pattern.letters}.get(config.train.recompute, config.train.recompute)
        return cls(
            model=model,
            pattern=pattern,
            intermediate_size=model.intermediate_size,
            kv_heads=model.attention.num_kv_heads,
            sequence_parallel=config.parallel.sequence and config.parallel.tensor > 1,
            recompute=recompute,
        )

    @property
    def projection(self) -> Initializer:
        """Initial values of embeddings and of projections that read the residual stream."""
        return normal(self.model.init_std)

    @property
    def output_projection(self) -> Initializer:
        """Initial values of projections that write to the residual stream."""
        return normal(self.model.init_std / math.sqrt(2 * len(self.pattern.letters)))

    @property
    def scores_per_token(self) -> int:
        """Retention scores a token has over the whole model: LTE layers times key-value heads."""
        return len(self.pattern.layers("L")) * self.kv_heads


class Fallback(NamedTuple):
    """An op that runs in PyTorch on a GPU, too, since its kernels do not take what the configuration asks.

    Attributes:
        op: its name.
        reason: the end of the sentence "its kernels …".
        key: the configuration key that a user would change.
        quadratic: whether training without kernels takes memory quadratic in a document's length.
    """

    op: str
    reason: str
    key: str
    quadratic: bool = False
