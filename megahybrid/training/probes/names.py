"""The probes' keys in metrics.jsonl, and what their lists' elements are; without torch."""

from __future__ import annotations

PREFIX = "probe_"
SECONDS = f"{PREFIX}seconds"
POSITION, GAIN, HITS, OTHERS = (f"{PREFIX}{name}" for name in ("position_loss", "gain", "hit_loss", "other_loss"))
ACCURACY, NLL, NULL = (f"{PREFIX}{name}_" for name in ("accuracy", "nll", "recency_null"))
KEPT, SOMEWHERE, BY_LAYER, GIVEN = (f"{PREFIX}{name}_" for name in ("kept", "held", "by_layer", "given"))
"""These end in an underscore, and go on with a task and its length."""
DEAD = f"{PREFIX}dead_"
"""And this with what a regulated layer has several of."""

_PLACES = ("inside", "beyond")
_ELEMENTS = {HITS: ("w", "4w", "farther"), ACCURACY: _PLACES, NLL: _PLACES, GIVEN: ("evicted", "kept")}


def elements(key: str, size: int) -> list[str]:
    """A name for each element of a probe's list of this size."""
    if key == POSITION:
        return [str(position) for position in first_positions(size)]
    if key.startswith(BY_LAYER):
        return [f"layer_{layer}" for layer in range(size)]
    numbers = tuple(map(str, range(size)))
    return list(next((names for start, names in _ELEMENTS.items() if key.startswith(start)), numbers))


def first_positions(bins: int) -> list[int]:
    """The first position of each bin of the loss by position: 0, 1, 2, 4, 8, …"""
    return [0, *(2**power for power in range(bins - 1))]
