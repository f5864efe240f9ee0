"""Chance that is the same on every machine and with every NumPy: a counter-based generator keyed by what it is for."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 1024
_MIX = tuple(
    (np.uint64(shift), np.uint64(factor)) for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
)
_LAST = np.uint64(31)


class Draws:
    """Random numbers that depend on the key alone, and on what was drawn before.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with a start and a step from the hash of the key: NumPy's generators
    take longer to make than a short sample takes to draw.
    """

    def __init__(self, *key: object):
        """`key`: numbers and strings, such as (seed, source, row, place)."""
        digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
        self._start, self._step = np.uint64(int.from_bytes(digest[:8])), np.uint64(int.from_bytes(digest[8:]) | 1)
        self._drawn = self._made = 0
        self._numbers = np.empty(0, np.uint64)

    def _raw(self, count: int) -> NDArray[np.uint64]:
        if self._drawn + count > len(self._numbers):
            # Many at once: a call of NumPy costs as much as a thousand of them.
            more = _mixed(self._start, self._step, self._made, max(count, _AT_ONCE))
            self._numbers = np.concatenate([self._numbers[self._drawn :], more])
            self._drawn, self._made = 0, self._made + len(more)
        self._drawn += count
        return self._numbers[self._drawn - count : self._drawn]

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`[count]`, in [0, 1)."""
        return (self._raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, limit: int, count: int) -> NDArray[np.int64]:
        """`[count]`, whole numbers of [0, limit)."""
        return (self.uniform(count) * limit).astype(np.int64)

    def order(self, size: int) -> NDArray[np.int64]:
        """range(size) in a random order."""
        low = np.uint64((1 << (size - 1).bit_length()) - 1) if size > 1 else np.uint64(0)
        # Each number in the low bits of its own draw: sorting them is quicker than argsort, and has no ties.
        return (np.sort(self._raw(size) & ~low | np.arange(size, dtype=np.uint64)) & low).astype(np.int64)

    def distinct(self, limit: int, count: int) -> NDArray[np.int64]:
        """`[count]`, different whole numbers of [0, limit), in a random order."""
        if 8 * count >= limit:
            return self.order(limit)[:count]
        chosen: dict[int, None] = {}
        while len(chosen) < count:
            chosen |= dict.fromkeys(self.below(limit, count).tolist())
        return np.fromiter(chosen, np.int64, len(chosen))[:count]


def _mixed(start: np.uint64, step: np.uint64, first: int, count: int) -> NDArray[np.uint64]:
    """`[count]`, the generator's numbers from the one numbered `first` on."""
    bits = np.arange(first, first + count, dtype=np.uint64)
    bits *= step
    bits += start
    for shift, factor in _MIX:
        bits ^= bits >> shift
        bits *= factor
    bits ^= bits >> _LAST
    return bits
