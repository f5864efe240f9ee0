"""Regulation: what layers of a kind count in training, what is steered by that between steps, and how both are shown.

A kind's mixers give every micro-batch's `Aux`: an auxiliary loss and counts. Its regulator, one object for all of its
layers, gets the counts of the whole global batch after every step, and sets what the mixers then read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from megahybrid.mixers import KINDS

if TYPE_CHECKING:  # pictures and tables need no torch
    import torch
    from torch import Tensor, nn

    from megahybrid.config.pattern import Pattern
    from megahybrid.config.schema import Config


class Count(NamedTuple):
    """A named count of a layer.

    Attributes:
        length: how many numbers it has over all ranks that split heads.
        split: whether each of these ranks has a part of them, in the order of ranks, or all of them alike.
        void: whether it counts what a layer left out, so that a step in which it is not 0 changes nothing: it is done
            once more, with `Context.whole`, and its counts are those of this time but for such ones. Where the guard
            leaves it out then, `Regulator.update` gets no counts, these neither.
    """

    length: int
    split: bool
    void: bool = False


class Quantity(NamedTuple):
    """A value of every head of every layer of a kind, or of whatever else its layers have several of.

    Attributes:
        key: its name in metrics.jsonl, where it is a list of members for each layer; nothing else's there.
        label: its name and unit at an axis.
        steered: whether it is set between steps, and drawn as steps; else it is measured, and drawn smoothed, too.
        log: whether its axis is logarithmic; zero is then left out.
        target: what is aimed at, as a word for it and a value, drawn as a line.
        dead: a member below this does nothing; None where none is.
        line: what the terminal says of it, with the fields low, high and mean over layers and heads; None: nothing.
        summary: its row in a run's table, as the row's name and its text with the same fields; None: no row.
    """

    key: str
    label: str
    steered: bool = False
    log: bool = False
    target: tuple[str, float] | None = None
    dead: float | None = None
    line: str | None = None
    summary: tuple[str, str] | None = None


class Regulator(Protocol):
    """What a kind of layer regulates, for all of its layers in a model, the same on every process.

    Attributes:
        name: a word without spaces, unlike other kinds'; names the auxiliary loss in metrics.jsonl, and pictures.
        member: what a layer has several values of, such as a head.
        counts: what `Aux.counts` may hold in every layer, by name.
    """

    name: str
    member: str
    counts: Mapping[str, Count]

    @classmethod
    def of(cls, config: Config, layers: Sequence[int], device: torch.device) -> Regulator:
        """The regulator of a validated configuration's layers with these numbers, before the first step."""

    @staticmethod
    def quantities(config: Config) -> tuple[Quantity, ...]:
        """What `metrics` gives, in the order in which it is drawn; at least one."""

    def attach(self, layer: int, mixer: nn.Module) -> None:
        """Let a layer's mixer on this process read what is steered, the part of this rank's heads."""

    def update(self, step: int, counts: Mapping[str, Tensor] | None, longest: int) -> None:
        """Take in an optimizer step and steer.

        Args:
            step: 1-based number of the optimizer step.
            counts: by name, float64 `[layers, length]` on the host, over the whole global batch; None where the step
                was left out.
            longest: tokens of the longest document in the global batch.
        """

    def metrics(self) -> dict[str, Tensor]:
        """The quantities as they are after the last step, `[layers, members]` each, by key."""

    def state(self) -> dict[str, list]:
        """What a checkpoint keeps, in JSON."""

    def load_state(self, state: dict[str, list]) -> None:
        """Take over a state that `state` gave. Raises UserError where it lacks something."""


def regulators(pattern: Pattern) -> dict[str, type[Regulator]]:
    """The regulators' classes of a pattern's kinds, by letter; without those that have none."""
    found = {letter: KINDS[letter].regulator() for letter in dict.fromkeys(pattern.letters)}
    return {letter: regulator for letter, regulator in found.items() if regulator is not None}


def filled(text: str, values: Sequence[Sequence[float]]) -> str:
    """A `Quantity`'s text with its fields' values, of `[layers, members]`."""
    flat = [value for row in values for value in row]
    return text.format(low=min(flat), high=max(flat), mean=sum(flat) / len(flat))
