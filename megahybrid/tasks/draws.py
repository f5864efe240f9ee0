"""Chance that is the same on every machine and with every NumPy: a counter-based generator keyed by what it is for."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


class Draws:
    """Random numbers that depend on the key alone, and on what was drawn before."""

    def __init__(self, *key: object):
        """`key`: numbers and strings, such as (seed, source, row, place)."""
        digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest))

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`[count]`, in [0, 1)."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, limit: int, count: int) -> NDArray[np.int64]:
        """`[count]`, whole numbers of [0, limit)."""
        return (self.uniform(count) * limit).astype(np.int64)

    def order(self, size: int) -> NDArray[np.int64]:
        """range(size) in a random order."""
        return np.argsort(self._bits.random_raw(size), kind="stable").astype(np.int64)

    def distinct(self, limit: int, count: int) -> NDArray[np.int64]:
        """`[count]`, different whole numbers of [0, limit), in a random order."""
        return self.order(limit)[:count]
