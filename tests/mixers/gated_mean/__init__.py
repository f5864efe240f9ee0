"""A kind of mixer that only the tests know, as another package would bring it: a gated causal mean, letter T."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megahybrid.errors import UserError
from megahybrid.key import key
from megahybrid.mixers.counting import linear
from megahybrid.mixers.kind import Activations, Kind, MicroBatch

if TYPE_CHECKING:
    from megahybrid.config.schema import ModelConfig
    from megahybrid.model.mixer import Mixer
    from megahybrid.model.regulation import Regulator


@dataclass
class GatedMeanConfig:
    """Gated causal mean (T)."""

    num_heads: int = key(4)
    """Heads."""
    head_dim: int | None = key(None, otherwise=lambda mean: 32 // mean.num_heads)
    """Channels of a head; all heads together have 32 when left out."""


class GatedMeanKind(Kind):
    """Every head's mean of the values so far, gated."""

    letter = "T"
    title = "gated mean"
    sections: ClassVar = {"mean": GatedMeanConfig}

    def check(self, model: ModelConfig) -> None:
        if model.mean.head_dim % 2:
            raise UserError("model.mean.head_dim must be even, for the sake of a check.")

    def split(self, model: ModelConfig) -> dict[str, int]:
        return {"model.mean.num_heads": model.mean.num_heads}

    def exchanged(self, model: ModelConfig) -> int:
        return 3 * model.mean.num_heads * model.mean.head_dim

    def flops(self, model: ModelConfig, length: int) -> dict[str, float]:
        return {"projections": linear(model.hidden_size, 3 * model.mean.num_heads * model.mean.head_dim)}

    def activations(self, model: ModelConfig, batch: MicroBatch) -> Activations:
        """Value, mean and gate, and what is made of both."""
        channels = model.mean.num_heads * model.mean.head_dim / batch.ranks
        return Activations(4 * batch.width * channels, 3 * batch.width * channels)

    def module(self) -> type[Mixer]:
        from tests.mixers.gated_mean.module import GatedMean

        return GatedMean

    def exported(self) -> type:
        from tests.mixers.gated_mean.hf import GatedMean

        return GatedMean

    def regulator(self) -> type[Regulator]:
        from tests.mixers.gated_mean.module import GateRegulator

        return GateRegulator
