"""Random numbers by a key: written out, and even."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from megahybrid.tasks.draws import Draws, DrawsTogether

MASK = 2**64 - 1


def splitmix(key, count):
    """SplitMix64 in Python's own integers."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    state, step = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big") | 1
    numbers = []
    for _ in range(count):
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        numbers.append(z ^ z >> 31)
        state = state + step & MASK
    return numbers


@pytest.mark.parametrize("counts", [(5,), (1, 2, 3, 2000), (1024, 1), (1000, 100, 1024, 3000)])
def test_numbers_are_splitmix64_however_they_are_asked_for(counts):
    key = ("train", 7, "recall", 5, 2)
    draws = Draws(*key)
    numbers = np.concatenate([draws.uniform(count) for count in counts])
    assert numbers.tolist() == [(each >> 11) / 2**53 for each in splitmix(key, sum(counts))]


def test_what_is_made_of_them():
    raw = splitmix((1,), 6)
    assert Draws(1).below(1000, 6).tolist() == [int((each >> 11) / 2**53 * 1000) for each in raw]
    assert Draws(1).order(6).tolist() == sorted(range(6), key=lambda each: raw[each] >> 3)
    assert Draws(1).order(1).tolist() == [0] and Draws(1).order(0).tolist() == []
    firsts = list(dict.fromkeys(int((each >> 11) / 2**53 * 40) for each in splitmix((1,), 100)))
    assert Draws(1).distinct(40, 4).tolist() == firsts[:4]


@pytest.mark.parametrize(("limit", "count"), [(5, 5), (5, 2), (40, 3), (200, 20), (10**9, 1000)])
def test_distinct_numbers_are_distinct_and_all_in_range(limit, count):
    for index in range(100):
        numbers = Draws(index).distinct(limit, count).tolist()
        assert len(set(numbers)) == len(numbers) == count and min(numbers) >= 0 and max(numbers) < limit


@pytest.mark.parametrize(("limit", "count"), [(5, 3), (40, 3)])
def test_distinct_numbers_are_even_at_every_place(limit, count):
    samples, seen = 20_000, np.zeros((count, limit))
    for index in range(samples):
        seen[range(count), Draws("even", index).distinct(limit, count)] += 1
    expected = samples / limit
    freedom = limit - 1
    assert (((seen - expected) ** 2 / expected).sum(1) < freedom + 5 * np.sqrt(2 * freedom)).all()


@pytest.mark.parametrize("about", [1, 40, 5000])
def test_draws_together_give_what_each_gives(about):
    """Some draw more than others on the way: of 20 numbers below 170 most have equal ones."""

    def drawn(draws):
        yield draws.below(1000, 7)
        yield draws.distinct(10**6, 5)
        yield draws.distinct(9, 4)
        yield draws.distinct(170, 20)
        yield draws.order(33)
        yield draws.uniform(3000)

    together = list(drawn(DrawsTogether([Draws("x", index) for index in range(50)], about)))
    each = zip(*(drawn(Draws("x", index)) for index in range(50)), strict=True)
    assert all(np.array_equal(rows, np.stack(alone)) for rows, alone in zip(together, each, strict=True))


def test_other_keys_are_other_numbers():
    keys = [(1, 23), (12, 3), ("1", 2, 3), ("a", "b"), ("ab",), (0,), ()]
    assert len({Draws(*key).uniform(1)[0] for key in keys}) == len(keys)
