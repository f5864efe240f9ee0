"""What every layer of one micro-batch reads beside its input, and what it gives back beside its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megahybrid_kernels import Sequences
from megahybrid_kernels.counter_dropout import fold


@dataclass(frozen=True)
class Context:
    """One micro-batch, as every layer sees it.

    Attributes:
        sequences: the documents' borders.
        dropout_keys: int64 `[layers, tokens]`, hashes of (seed, step, sample, position, layer); None switches dropout
            off.
        aux_scale: weight of the auxiliary loss beside the micro-batch's loss (1 / micro-batches of the step).
        in_place: whether mixers may overwrite the states they are given, as they may when nobody needs those again.
    """

    sequences: Sequences
    dropout_keys: Tensor | None = None
    aux_scale: float = 1.0
    in_place: bool = False

    @property
    def training(self) -> bool:
        """Whether dropout and training's own visibility rule apply."""
        return self.dropout_keys is not None


def dropout_keys(seed: int, step: int, samples: Tensor, sample_positions: Tensor, layers: int) -> Tensor:
    """Keys for `Context.dropout_keys` of a whole model of so many layers, the same in every layout.

    samples and sample_positions are int64 `[tokens]`. All layers' are made at once, since a GPU's launches cost more.
    """
    keys = fold(fold(fold(samples, seed), step), sample_positions)
    return fold(keys, torch.arange(layers, device=keys.device).unsqueeze(1))


class Aux(NamedTuple):
    """What a layer gives beside its output in training, for its kind's regulator (regulation.py).

    Attributes:
        loss: scalar, this rank's part of the auxiliary loss: the sum over tensor parallel ranks is the whole.
        counts: int64, what the regulator declares, by name; of a count that is split this rank's part.
    """

    loss: Tensor
    counts: dict[str, Tensor]
