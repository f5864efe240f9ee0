"""What a step counts on the way: losses, kept tokens and wishes of processes, summed over all of them at once."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid.model.context import Aux
from megahybrid.parallel import groups


class StepReport:
    """Sums over the micro-batches of a step, in one vector of float64, where counts stay exact.

    Attributes:
        loss, retention_loss: scalars, sums over micro-batches.
        positions: scalar, positions counted a head.
        stop, saving: scalars, how many processes want to stop, and are still writing a checkpoint.
        kept: `[LTE layers, kv heads]` of the whole model, positions with a positive score.
    """

    def __init__(self, lte_layers: list[int], kv_heads: int, heads: slice, device: torch.device):
        """`heads`: this rank's among the kv_heads."""
        self._rows = {layer: row for row, layer in enumerate(lte_layers)}
        self._heads, self._shape = heads, (len(lte_layers), kv_heads)
        self._look_at(torch.zeros(5 + len(lte_layers) * kv_heads, dtype=torch.float64, device=device))

    def _look_at(self, values: Tensor) -> None:
        self._values = values
        self.loss, self.retention_loss, self.positions, self.stop, self.saving = values[:5]
        self.kept = values[5:].view(self._shape)

    def add(self, layer: int, aux: Aux) -> None:
        """A retention layer's by-products on this rank, for one micro-batch."""
        self.retention_loss += aux.loss.detach()
        self.kept[self._rows[layer], self._heads] += aux.kept

    def sum_over_all(self) -> None:
        """Sum over all processes, and go to the host: waits for the passes to end."""
        self._look_at(groups.sum_over_all(self._values).cpu())
