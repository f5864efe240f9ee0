"""What the layers are built from: the model's configuration with everything derived from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megahybrid.config.pattern import Pattern, parse_pattern
from megahybrid.config.schema import Config, ModelConfig
from megahybrid.config.validate import keepers
from megahybrid.key import derived
from megahybrid.parallel.parameters import Initializer, normal


@dataclass(frozen=True)
class Settings:
    """The architecture as its layers need it.

    Attributes:
        model: the configuration, with what is left out derived.
        pattern: the parsed layer pattern.
        sequence_parallel: whether the residual stream is split over the tensor parallel ranks.
        recompute: letters of the layers that recompute their activations in the backward pass.
        keepers: letters of those with which context parallel ranks keep their tokens, rather than exchange them for
            heads.
    """

    model: ModelConfig
    pattern: Pattern
    sequence_parallel: bool
    recompute: str
    keepers: str

    @classmethod
    def of(cls, config: Config) -> Settings:
        """Derive the settings from a validated configuration."""
        model, pattern = derived(config.model), parse_pattern(config.model.pattern)
        recompute = {"none": "", "all": pattern.letters}.get(config.train.recompute, config.train.recompute)
        return cls(
            model=model,
            pattern=pattern,
            sequence_parallel=config.parallel.sequence and config.parallel.tensor > 1,
            recompute=recompute,
            keepers=keepers(config),
        )

    @property
    def projection(self) -> Initializer:
        """Initial values of embeddings and of projections that read the residual stream."""
        return normal(self.model.init_std)

    @property
    def output_projection(self) -> Initializer:
        """Initial values of projections that write to the residual stream."""
        return normal(self.model.init_std / math.sqrt(2 * len(self.pattern.letters)))
