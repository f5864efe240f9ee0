"""What a step counts on the way: losses, what regulators count and wishes of processes, summed over all at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megahybrid.errors import UserError
from megahybrid.model.context import Aux
from megahybrid.model.regulation import Regulator
from megahybrid.parallel import groups


class StepReport:
    """Sums over the micro-batches of a step, in one vector of float64, where counts stay exact.

    Attributes:
        loss: scalar, sum over micro-batches.
        squares: scalar, of the gradient's entries that this rank counts.
        stop, saving: scalars, how many processes want to stop, and are at work on a checkpoint.
        longest: `[replicas]`, tokens of the longest document of each.
        aux_loss: by letter of a regulated kind, scalars, likewise.
        counts: by letter and name, `[layers of the kind, length]` of the whole model.
    """

    def __init__(self, letters: str, regulators: Mapping[str, Regulator], device: torch.device):
        """`letters`: of all layers; `regulators`: by letter."""
        self._regulators = regulators
        self._places = [(letter, letters[:number].count(letter)) for number, letter in enumerate(letters)]
        self._shapes: dict[tuple[str, str | None], tuple[int, ...]] = {}  # None for the auxiliary loss
        for letter, regulator in regulators.items():
            self._shapes[letter, None] = ()
            for name, count in regulator.counts.items():
                self._shapes[letter, name] = letters.count(letter), count.length
        self._sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._replica, self._replicas = groups.data_parallel()
        size = 4 + self._replicas + sum(self._sizes)
        self._look_at(torch.zeros(size, dtype=torch.float64, device=device))

    def _look_at(self, values: Tensor) -> None:
        self._values = values
        own, self.longest, rest = values[:4], values[4 : 4 + self._replicas], values[4 + self._replicas :]
        self.loss, self.squares, self.stop, self.saving = own
        self.aux_loss: dict[str, Tensor] = {}
        self.counts: dict[str, dict[str, Tensor]] = {letter: {} for letter in self._regulators}
        for ((letter, name), shape), part in zip(self._shapes.items(), rest.split(self._sizes), strict=True):
            into, key = (self.aux_loss, letter) if name is None else (self.counts[letter], name)
            into[key] = part.view(shape)

    def void(self) -> Tensor:
        """Scalar: how much layers left out, by counts that make a step void."""
        return sum((part.sum() for part in self._left_out().values()), torch.zeros_like(self.loss))

    def take_left_out(self, before: StepReport) -> None:
        """Have the counts of the void passes before these of what they left out."""
        for key, part in before._left_out().items():
            self._left_out()[key].copy_(part)

    def _left_out(self) -> dict[tuple[str, str], Tensor]:
        return {
            (letter, name): self.counts[letter][name]
            for letter, regulator in self._regulators.items()
            for name, count in regulator.counts.items()
            if count.void
        }

    def note_longest(self, tokens: int) -> None:
        """The longest document of this replica's micro-batches has so many tokens."""
        if groups.head_parallel()[0] == groups.pipeline_parallel()[0] == 0:  # a sum over all must find it once
            self.longest[self._replica] = tokens

    def add(self, layer: int, aux: Aux) -> None:
        """A layer's by-products on this rank, for one micro-batch. Raises UserError for one without a regulator."""
        letter, row = self._places[layer]
        if letter not in self._regulators:
            raise UserError(f"The mixer '{letter}' gives an auxiliary loss, but no regulator reports it; give it one.")
        self.aux_loss[letter] += aux.loss.detach()
        rank, size = groups.head_parallel()
        for name, count in self._regulators[letter].counts.items():
            whole = self.counts[letter][name][row]
            if count.split:
                # Of context parallel ranks that keep their tokens each has a part of the same heads' count.
                shares = whole.unflatten(0, (-1, len(aux.counts[name])))
                shares[rank * len(shares) // size].add_(aux.counts[name])
            elif rank == 0:
                whole += aux.counts[name]

    def sum_over_all(self) -> None:
        """Sum over all processes."""
        groups.sum_over_all(self._values)

    def to_host(self) -> None:
        """Go to the host, which waits for the device to come this far."""
        self._look_at(self._values.cpu())
