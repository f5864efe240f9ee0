"""What a step counts on the way: losses, what regulators count and wishes of processes, summed over all at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megahybrid.data.packing import moved
from megahybrid.errors import UserError
from megahybrid.model.context import Aux
from megahybrid.model.regulation import Regulator
from megahybrid.parallel import groups


class StepReport:
    """Sums over the micro-batches of a step, in one vector of float64, where counts stay exact.

    Attributes:
        loss: scalar, sum over micro-batches.
        squares: scalar, of the gradient's entries that this rank counts.
        judged: `[2 + void counts]`, loss, squares, and what layers left out, by counts that make a step void.
        stop, saving: scalars on the host, how many processes want to stop, and are at work on a checkpoint.
        longest: `[replicas]` on the host, tokens of the longest document of each.
        aux_loss: by letter of a regulated kind, scalars, likewise.
        counts: by letter and name, `[layers of the kind, length]` of the whole model.
    """

    def __init__(self, letters: str, regulators: Mapping[str, Regulator], device: torch.device):
        """`letters`: of all layers; `regulators`: by letter."""
        self._regulators = regulators
        self._places = [(letter, letters[:number].count(letter)) for number, letter in enumerate(letters)]
        counts = {(letter, name): count for letter, each in regulators.items() for name, count in each.counts.items()}
        self._void = [key for key, count in counts.items() if count.void]
        self._rest = [key for key in counts if key not in self._void]
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {
            (letter, name): (letters.count(letter), count.length) for (letter, name), count in counts.items()
        }
        self._replica, self._replicas = groups.data_parallel()
        lengths = {key: math.prod(shape) for key, shape in self._shapes.items()}
        void, self._parts = sum(lengths[key] for key in self._void), [lengths[key] for key in self._void + self._rest]
        rest = [len(regulators), *(lengths[key] for key in self._rest)]
        self._sizes = [2 + void, 2 + self._replicas, *rest]
        self._look_at(torch.zeros(sum(self._sizes), dtype=torch.float64, device=device))
        self.tell(stop=False, saving=False, longest=0)

    def _look_at(self, values: Tensor) -> None:
        self._values = values
        self.judged, self._told_by_all, aux_losses, *rest = values.split(self._sizes)
        self.loss, self.squares, *_ = self.judged
        void = self.judged[2:].split(self._parts[: len(self._void)]) if self._void else ()
        self.aux_loss: dict[str, Tensor] = dict(zip(self._regulators, aux_losses, strict=True))
        self.counts: dict[str, dict[str, Tensor]] = {letter: {} for letter in self._regulators}
        for (letter, name), part in zip(self._void + self._rest, [*void, *rest], strict=True):
            self.counts[letter][name] = part.view(self._shapes[letter, name])

    def _look_at_told(self, told: Tensor) -> None:
        self._told = told
        (self.stop, self.saving), self.longest = told[:2], told[2:]

    def void(self) -> Tensor:
        """Scalar: how much layers left out, by counts that make a step void."""
        return self.judged[2:].sum()

    def take_left_out(self, before: StepReport) -> None:
        """Have the counts of the void passes before these of what they left out."""
        self.judged[2:] = before.judged[2:]

    def tell(self, stop: bool, saving: bool, longest: int) -> None:
        """What this process knows without asking its device: its wish to stop, whether it is at work on a checkpoint,
        and the tokens of the longest document of this replica's micro-batches. It goes there only to be summed."""
        lengths = [0] * self._replicas
        if groups.head_parallel()[0] == groups.pipeline_parallel()[0] == 0:  # a sum over all must find it once
            lengths[self._replica] = longest
        self._look_at_told(torch.tensor([stop, saving, *lengths], dtype=torch.float64))

    def add(self, layer: int, aux: Aux) -> None:
        """A layer's by-products on this rank, for one micro-batch. Raises UserError for one without a regulator."""
        letter, row = self._places[layer]
        if letter not in self._regulators:
            raise UserError(f"The mixer '{letter}' gives an auxiliary loss, but no regulator reports it; give it one.")
        self.aux_loss[letter] += aux.loss.detach()
        rank, size = groups.head_parallel()
        for name, counted in aux.counts.items():
            whole = self.counts[letter][name][row]
            if self._regulators[letter].counts[name].split:
                # Of context parallel ranks that keep their tokens each has a part of the same heads' count.
                shares = whole.unflatten(0, (-1, len(counted)))
                shares[rank * len(shares) // size].add_(counted)
            elif rank == 0:
                whole += counted

    def sum_over_all(self) -> None:
        """Sum over all processes."""
        if groups.world()[1] > 1:
            self._told_by_all.copy_(moved(self._told, self._values.device))
            groups.sum_over_all(self._values)

    def to_host(self) -> None:
        """Go to the host, which waits for the device to come this far."""
        self._look_at(self._values.cpu())
        if groups.world()[1] > 1:
            self._look_at_told(self._told_by_all)
