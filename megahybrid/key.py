"""What the schema says of a key beside its type, default and meaning, and how that is read back."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

_METADATA = "key"


@dataclass(frozen=True)
class Key:
    """The rules of one key; `key` says what they mean."""

    may_change: bool
    above: float | None
    at_least: float | None
    at_most: float | None
    below: float | None
    choices: tuple[str | int, ...]
    otherwise: Callable[[Any], Any] | None

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence, or None; of a list, each element has to fit."""
        if isinstance(value, (list, tuple)):
            return next(filter(None, map(self.fault, value)), None)
        if self.choices and value is not None:
            return None if value in self.choices else f"choose one of {', '.join(map(str, self.choices))}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        if not math.isfinite(value):
            return "it must be a finite number"
        fits = all(holds(value, bound) for bound, _, holds in self._bounds())
        return None if fits else f"it must be {self.range()}"

    def range(self) -> str:
        """The bounds of a number, in words."""
        return " and ".join(f"{words} {bound:g}" for bound, words, _ in self._bounds())

    def _bounds(self) -> Iterator[tuple[float, str, Callable[[float, float], bool]]]:
        every = (
            (self.above, "greater than", operator.gt),
            (self.at_least, "at least", operator.ge),
            (self.at_most, "at most", operator.le),
            (self.below, "below", operator.lt),
        )
        return (each for each in every if each[0] is not None)


def key(
    default: Any = MISSING,
    *,
    may_change: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str | int, ...] = (),
    otherwise: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of the schema.

    Args:
        default: its value where no recipe has one; a recipe must have one where there is no default.
        may_change: whether it may change when a run goes on. What decides the model, or which samples a step reads, may
            not.
        above, at_least, at_most, below: bounds of a number, or of each number in a list; above 0 where no lower bound
            is given. NaN and infinity never fit.
        choices: the values that there are.
        otherwise: gives the value that holds when it is left out (None, or an empty list), from its section.
    """
    if above is None and at_least is None:
        above = 0
    rules = {_METADATA: Key(may_change, above, at_least, at_most, below, choices, otherwise)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=rules)
    return dataclasses.field(default=default, metadata=rules)


def keys(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Key]]:
    """Every key of a configuration, or of a section of one: its dotted name, its value and its rules."""
    for name, holder, field, rules in walk(section, prefix):
        yield name, getattr(holder, field.name), rules


def unusual(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Key]]:
    """Of `keys` those whose value is not the one that holds where they are left out."""
    for name, holder, field, rules in walk(section, prefix):
        value = getattr(holder, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default and not (rules.otherwise is not None and value == rules.otherwise(holder)):
            yield name, value, rules


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field, Key]]:
    """Every key's dotted name, the section that holds it, its field there and its rules."""
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{name}.")
        elif _METADATA in field.metadata:
            yield name, section, field, field.metadata[_METADATA]
        else:
            for inner, each in value.items():
                yield from walk(each, f"{name}.{inner}.")


def derived(section: Any) -> Any:
    """A configuration, or a section of one, with every value that was left out in favour of a derived one."""
    changes = {}
    for field in dataclasses.fields(section):
        value, rules = getattr(section, field.name), field.metadata.get(_METADATA)
        if dataclasses.is_dataclass(value):
            changes[field.name] = derived(value)
        elif rules is None:
            changes[field.name] = {name: derived(each) for name, each in value.items()}
        elif rules.otherwise is not None and value in (None, []):
            changes[field.name] = rules.otherwise(section)
    return dataclasses.replace(section, **changes)
