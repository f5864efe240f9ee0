"""What an experiment's statement comes to in figures: bounds of a quantity, for every seed of an arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
"""What a run came to: setting, arm, seed, rate, and each quantity by its name; None for one that is not known."""

Seeds = Mapping[str, Sequence[int]]
"""By arm, the seeds that are to be known."""


@dataclass
class Check:
    """What must hold of a quantity of an arm, for every seed of it (and of the other arm)."""

    quantity: str
    arm: str
    at_least: float | None = None
    at_most: float | None = None
    above: str | None = None
    """Another arm, every seed of which is exceeded by every one of this."""
    below: str | None = None
    not_below: str | None = None
    """Another arm, whose mean over seeds this one's does not fall below, by more than `by`."""
    by: float = 0.0
    settings: list[str] = field(default_factory=list)
    """The settings in which it must hold; all when left out."""

    @property
    def other(self) -> str | None:
        """The arm that it compares with, if it does."""
        return self.above or self.below or self.not_below

    @property
    def arms(self) -> list[str]:
        """Those that it speaks of."""
        return [self.arm, *filter(None, [self.other])]

    def asked_in(self, setting: str) -> bool:
        """In all, where it names none."""
        return not self.settings or setting in self.settings

    def holds(self, rows: Sequence[Row], seeds: Seeds) -> bool | None:
        """Of a setting's runs; None where it is open, since a seed's value is not known and those that are do not
        settle it. A mean is open until all are known. NaN keeps no bound."""
        known = [self._known(arm, rows, seeds) for arm in self.arms]
        whole = all(len(values) == len(seeds[arm]) for values, arm in zip(known, self.arms, strict=True))
        if not all(known) or (self.not_below and not whole):
            return None
        broken = any(math.isnan(value) for values in known for value in values.values())
        if broken or self._margin(*map(dict.values, known)) < 0:
            return False
        return True if whole else None

    def told(self, rows: Sequence[Row], seeds: Seeds) -> str:
        """In a line: whether it holds, what it asks, and what is known."""
        answer = {True: "yes", False: "no", None: "missing"}[self.holds(rows, seeds)]
        known = [self._known(arm, rows, seeds) for arm in self.arms]
        counts = [f"{len(values)} of {len(seeds[arm])} seeds" for values, arm in zip(known, self.arms, strict=True)]
        came_to = f"{self._came_to(*map(dict.values, known))}, " if all(known) else ""
        return f"{answer}: {self.quantity} of {self.arm} {self._bound()}: {came_to}{' and '.join(counts)}"

    def _known(self, arm: str, rows: Sequence[Row], seeds: Seeds) -> dict[int, float]:
        """By seed."""
        rows = [row for row in rows if row["arm"] == arm and row["seed"] in seeds[arm]]
        return {row["seed"]: row[self.quantity] for row in rows if row[self.quantity] is not None}

    def _margin(self, own: Iterable[float], others: Iterable[float] = ()) -> float:
        """By how much it holds; below 0 where it does not."""
        if self.at_least is not None:
            return min(own) - self.at_least
        if self.at_most is not None:
            return self.at_most - max(own)
        if self.not_below:
            return statistics.fmean(own) - (statistics.fmean(others) - self.by)
        return (min(own) - max(others) if self.above else min(others) - max(own)) - self.by

    def _bound(self) -> str:
        if self.other is None:
            return f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        if self.not_below:
            sides, by, mean = ("above", "below"), -self.by, " in the mean"
        else:
            sides, by, mean = ("above", "below") if self.above else ("below", "above"), self.by, ""
        far = f"at least {by:g} {sides[0]}" if by > 0 else f"at most {-by:g} {sides[1]}" if by else f"not {sides[1]}"
        return f"{far} {self.other}{mean}"

    def _came_to(self, own: Iterable[float], others: Iterable[float] = ()) -> str:
        if self.not_below:
            return f"means {statistics.fmean(own):.3f} and {statistics.fmean(others):.3f}"
        if self.at_least is not None or self.above:
            return f"least {min(own):.3f}" + (f", most of {self.above} {max(others):.3f}" if self.above else "")
        return f"most {max(own):.3f}" + (f", least of {self.below} {min(others):.3f}" if self.below else "")
