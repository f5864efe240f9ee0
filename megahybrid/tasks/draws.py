"""Chance that is the same on every machine and with every NumPy: a counter-based generator keyed by what it is for."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 1024
_MIX = tuple(
    (np.uint64(shift), np.uint64(factor)) for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
)
_LAST = np.uint64(31)
_NONE = np.empty(0, np.uint64)


class _Numbers(ABC):
    """Random numbers along the last dimension."""

    @abstractmethod
    def _raw(self, count: int) -> NDArray[np.uint64]:
        """The next ones, `[…, count]`."""

    @abstractmethod
    def distinct(self, limit: int, count: int) -> NDArray[np.int64]:
        """`[…, count]`, different whole numbers of [0, limit), in a random order."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`[…, count]`, in [0, 1)."""
        return (self._raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, limit: int, count: int) -> NDArray[np.int64]:
        """`[…, count]`, whole numbers of [0, limit)."""
        return (self.uniform(count) * limit).astype(np.int64)

    def order(self, size: int) -> NDArray[np.int64]:
        """`[…, size]`: range(size) in a random order."""
        low = np.uint64((1 << (size - 1).bit_length()) - 1) if size > 1 else np.uint64(0)
        # Each number in the low bits of its own draw: sorting them is quicker than argsort, and has no ties.
        return (np.sort(self._raw(size) & ~low | np.arange(size, dtype=np.uint64)) & low).astype(np.int64)


class Draws(_Numbers):
    """Random numbers that depend on the key alone, and on what was drawn before.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with a start and a step from the hash of the key: NumPy's generators
    take longer to make than a short sample takes to draw.
    """

    def __init__(self, *key: object):
        """`key`: numbers and strings, such as (seed, source, row, place)."""
        digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
        self._start, self._step = np.uint64(int.from_bytes(digest[:8])), np.uint64(int.from_bytes(digest[8:]) | 1)
        self._drawn = self._made = 0
        self._numbers = _NONE

    def _raw(self, count: int) -> NDArray[np.uint64]:
        if self._drawn + count > len(self._numbers):
            # Many at once: a call of NumPy costs as much as a thousand of them.
            more = _mixed(self._start, self._step, self._made, max(count, _AT_ONCE))
            self._numbers = np.concatenate([self._numbers[self._drawn :], more])
            self._drawn, self._made = 0, self._made + len(more)
        self._drawn += count
        return self._numbers[self._drawn - count : self._drawn]

    def distinct(self, limit: int, count: int) -> NDArray[np.int64]:
        """`[count]`, see `_Numbers`."""
        return self.order(limit)[:count] if 8 * count >= limit else self._first_distinct(limit, count, [])

    def _first_distinct(self, limit: int, count: int, drawn: Sequence[int]) -> NDArray[np.int64]:
        """Of what was drawn and then of what is drawn."""
        chosen = dict.fromkeys(drawn)
        while len(chosen) < count:
            chosen |= dict.fromkeys(self.below(limit, count).tolist())
        return np.fromiter(chosen, np.int64, len(chosen))[:count]


class DrawsTogether(_Numbers):
    """The numbers that each of several `Draws` gives, `[draws, count]`, in the calls of NumPy that one takes."""

    def __init__(self, draws: Sequence[Draws], about: int):
        """`draws`: of which nothing was drawn yet. `about`: how many of each will be."""
        self._draws = draws
        starts, steps = (np.array([[getattr(each, name)] for each in draws]) for name in ("_start", "_step"))
        self._numbers, self._drawn = _mixed(starts, steps, 0, about), 0
        self._apart = False  # one has drawn more than another

    def _raw(self, count: int) -> NDArray[np.uint64]:
        end = self._drawn + count
        if self._apart or end > self._numbers.shape[1]:
            self._part()
            return np.stack([each._raw(count) for each in self._draws])
        self._drawn = end
        return self._numbers[:, end - count : end]

    def _part(self) -> None:
        """From here on each draws by itself."""
        if not self._apart:
            for each, numbers in zip(self._draws, self._numbers, strict=True):
                each._numbers, each._made, each._drawn = numbers, len(numbers), self._drawn
        self._apart = True

    def distinct(self, limit: int, count: int) -> NDArray[np.int64]:
        """`[draws, count]`, see `_Numbers`."""
        if 8 * count >= limit:
            return self.order(limit)[:, :count]
        found = self.below(limit, count)
        ascending = np.sort(found)
        for number in np.flatnonzero((ascending[:, 1:] == ascending[:, :-1]).any(1)):
            self._part()
            found[number] = self._draws[number]._first_distinct(limit, count, found[number].tolist())
        return found


def _mixed(start: Any, step: Any, first: int, count: int) -> NDArray[np.uint64]:
    """`[…, count]`, the numbers of a generator, or of several (`[…, 1]`), from the one numbered `first` on."""
    bits = _numbered(first, count) * step
    bits += start
    for shift, factor in _MIX:
        bits ^= bits >> shift
        bits *= factor
    bits ^= bits >> _LAST
    return bits


@lru_cache(maxsize=64)
def _numbered(first: int, count: int) -> NDArray[np.uint64]:
    return np.arange(first, first + count, dtype=np.uint64)
