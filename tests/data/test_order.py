"""The order of samples: exact shares, every sample before any again, the same from everywhere."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megahybrid.data.order import ENDLESS, OrderedSource, SampleOrder, apportion, permutation


def order_of(sources, seed=3, block_size=64):
    """`sources`: name → (samples of each shard, weight)."""
    listed = [OrderedSource(name, np.array(shards, np.int64), weight) for name, (shards, weight) in sources.items()]
    return SampleOrder(listed, seed, block_size)


THREE = {"a": ([40] * 10 + [7], 5.0), "b": ([100, 1, 30], 3.0), "c": ([2, 2], 1.5)}


def test_permutation_never_changes():
    assert permutation(8, "block", 42, 0, 1).tolist() == [1, 7, 2, 6, 5, 0, 4, 3]
    assert sorted(permutation(1000, "x")) == list(range(1000))
    assert len({tuple(permutation(20, "x", key)) for key in range(50)}) == 50


def test_permutation_is_uniform():
    firsts = Counter(int(permutation(5, key)[0]) for key in range(5000))
    assert all(abs(firsts[i] - 1000) < 150 for i in range(5))


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [(10, [1, 1, 1], [4, 3, 3]), (7, [3, 4], [3, 4]), (5, [0.1, 0.65, 0.25], [1, 3, 1]), (3, [1e-9, 1], [0, 3])],
)
def test_apportion_by_hand(total, weights, expected):
    assert apportion(total, weights) == expected


@pytest.mark.parametrize("block_size", [1, 7, 64, 10_000])
def test_weights_by_size_give_every_sample_once_an_epoch(block_size):
    sizes = {name: (shards, float(sum(shards))) for name, (shards, _) in THREE.items()}
    order = order_of(sizes, block_size=block_size)
    total = 407 + 131 + 4
    assert order.samples_per_epoch == total
    epochs = [order.indices(epoch * total, total).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order_of(sizes, seed=4, block_size=block_size).indices(0, total).tolist() != epochs[0]


def test_weights_are_exact_and_even_and_no_sample_comes_again_before_the_others():
    order, total = order_of(THREE), 542
    firsts = np.array([0, 407, 538, 542])
    expected = apportion(total, [5, 3, 1.5])
    epochs = 12
    seen = order.indices(0, epochs * total)
    source = np.searchsorted(firsts, seen, side="right") - 1
    for epoch in range(epochs):
        assert np.bincount(source[epoch * total : (epoch + 1) * total]).tolist() == expected
    for number, size in enumerate(np.diff(firsts)):
        mine = seen[source == number]
        times = np.bincount(mine - firsts[number], minlength=size)
        assert times.max() - times.min() <= 1  # pass after pass, up to here
        # Within a block the passes of a small source lie together, between blocks they do not.
        running = np.cumsum(source == number)
        ideal = np.arange(1, len(seen) + 1) * expected[number] / total
        assert np.abs(running - ideal).max() < 40


def test_any_part_of_the_order_is_found_alone():
    whole = order_of(THREE).indices(0, 3000)
    for begin, count in [(0, 1), (541, 2), (1083, 900), (2999, 1), (700, 0)]:
        assert order_of(THREE).indices(begin, count).tolist() == whole[begin : begin + count].tolist()
    steps = order_of(THREE)
    assert np.concatenate([steps.indices(at, 10) for at in range(0, 3000, 10)]).tolist() == whole.tolist()


def test_blocks_name_the_shards_that_are_read():
    order = order_of(THREE)
    shards = np.repeat(np.arange(11 + 3 + 2), [*THREE["a"][0], *THREE["b"][0], *THREE["c"][0]])
    for position, count in [(0, 5), (500, 100), (1000, 300)]:
        blocks = list(order.blocks(position, count))
        assert all(second == order.following(*first) for first, second in pairwise(blocks))
        named = {shard for block in blocks for shard in order.shards(*block)}
        read = set(shards[order.indices(position, count)].tolist())
        assert read <= named
        assert len(named) < 16 or count > 60


def test_shuffling_mixes_within_a_block_and_shards_over_the_epoch():
    order = order_of({"a": ([100] * 50, 1.0)}, block_size=500)
    epoch = order.indices(0, 5000)
    ranks = np.argsort(epoch)
    assert abs(np.corrcoef(np.arange(5000), epoch)[0, 1]) < 0.4  # shards come in random order
    spread = [np.ptp(ranks[shard * 100 : shard * 100 + 100]) for shard in range(50)]
    assert np.median(spread) > 350  # and a shard's samples are spread over its block
    again = order.indices(5000, 5000)
    assert (epoch // 100 != again // 100).mean() > 0.9


def test_a_large_order_costs_nothing_to_enter():
    order = SampleOrder([OrderedSource("a", np.full(100_000, 4000), 1.0)], 1, 16384)
    indices = order.indices(399_000_000, 256)
    assert len(set(indices.tolist())) == 256 and indices.max() < 400_000_000


def test_a_single_shard_is_shuffled_anew_every_epoch():
    order = order_of({"a": ([50], 1.0)})
    epochs = order.indices(0, 150).reshape(3, 50).tolist()
    assert len({tuple(epoch) for epoch in epochs}) == 3 and all(sorted(epoch) == list(range(50)) for epoch in epochs)


def test_an_endless_source_counts_on_beside_others_and_alone():
    """Its numbers come in order, at places that are shuffled; the others keep their samples and their shares."""
    order = order_of({"a": ([30, 34], 3.0), "x": ([], 1.0), "y": ([], 2.0)}, block_size=20)
    assert order.samples_per_epoch == 64 and order.counts == [32, 11, 21]
    seen = order.indices(0, 10 * 64)
    for number, share in ((1, 110), (2, 210)):
        assert seen[seen // ENDLESS == number].tolist() == [number * ENDLESS + each for each in range(share)]
    text = seen[seen < ENDLESS]
    assert np.bincount(text, minlength=64).tolist() == [5] * 64
    assert np.abs(np.cumsum(seen >= ENDLESS) - np.arange(640) / 2).max() < 15
    assert (np.diff(np.flatnonzero(seen >= ENDLESS)) == 1).mean() < 0.7
    assert order_of({"x": ([], 1.0)}, block_size=16).indices(5, 40).tolist() == list(range(ENDLESS + 5, ENDLESS + 45))
