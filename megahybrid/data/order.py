"""Which samples a step takes: a function of the position alone, whatever the layout.

Every source is read pass after pass, each pass through all its samples once, its shards in a new random order. An
epoch takes as many samples as the sources hold together, of each source in proportion to its weight, evenly over the
epoch; a source goes on in the next epoch where it stopped. So when weights are the sizes, an epoch has every sample
once; with other weights some sources need several epochs for a pass, others make several passes in one, and still no
sample comes again before all others of its source have come. An epoch is cut into blocks of about `block_size`
samples, and a block is shuffled as a whole: any place in the order is found without computing what comes before it.

An endless source has no passes: its samples come once, in the order of their numbers, at random places of a block. It
adds nothing to the length of an epoch, which is a block where no other source is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

ENDLESS = 1 << 40
"""The index of the first sample of the first endless source; each source's first is as far behind the last's."""


def permutation(size: int, *key: object) -> NDArray[np.int64]:
    """range(size) in an order that depends on the key alone: the same on every machine and with every NumPy."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    draws = np.random.Philox(key=int.from_bytes(digest)).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts proportional to the weights (all above 0), as exactly as whole numbers can be."""
    exact = [Fraction(weight) for weight in weights]
    shares = [total * weight / sum(exact) for weight in exact]
    parts = [int(share) for share in shares]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - shares[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


@dataclass(frozen=True)
class OrderedSource:
    """What the order knows of a source."""

    name: str
    """Its name, part of its shuffle's key."""
    shard_samples: NDArray[np.int64]
    """`[shards]`: samples of each shard, in the order of their indices; of no shard where the source is endless."""
    weight: float
    """Part of an epoch, relative to the other sources'."""

    @property
    def samples(self) -> int:
        """Over all shards."""
        return int(self.shard_samples.sum())


class SampleOrder:
    """The endless order of samples; indices count through the sources' shards in the order given, those of endless
    sources from the multiples of ENDLESS on."""

    def __init__(self, sources: Sequence[OrderedSource], seed: int, block_size: int):
        """Endless sources come after all others, which have a sample each at least. `block_size`: samples that are
        shuffled among each other."""
        sizes = [source.samples for source in sources if source.samples]
        self._finite = len(sizes)
        self._sources = [_Passes(source, seed) if source.samples else _Endless() for source in sources]
        self.samples_per_epoch = sum(sizes) or block_size
        """Samples before the order's next epoch begins."""
        self.counts = apportion(self.samples_per_epoch, [source.weight for source in sources])
        """Of each source, the samples in an epoch."""
        self._offsets = np.cumsum([0, *sizes])[:-1].tolist()
        self._offsets += [ENDLESS * (number + 1) for number in range(len(sources) - self._finite)]
        self._shard_offsets = np.cumsum([0, *(len(source.shard_samples) for source in sources)]).tolist()
        self._seed = seed
        self._blocks = max(1, -(-self.samples_per_epoch // block_size))
        self._cached: dict[tuple[int, int], NDArray[np.int64]] = {}

    def indices(self, position: int, count: int) -> NDArray[np.int64]:
        """`[count]`: the indices of the samples from `position` on."""
        parts = []
        while count > 0:
            epoch, block, begin = self._locate(position)
            part = self._block(epoch, block)[begin : begin + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def blocks(self, position: int, count: int) -> Iterator[tuple[int, int]]:
        """The (epoch, block) pairs that hold the `count` samples from `position` on."""
        end = position + count
        while position < end:
            epoch, block, begin = self._locate(position)
            yield epoch, block
            position += self._begin(block + 1) - self._begin(block) - begin

    def following(self, epoch: int, block: int) -> tuple[int, int]:
        """The block after this one."""
        return divmod(epoch * self._blocks + block + 1, self._blocks)

    def shards(self, epoch: int, block: int) -> list[int]:
        """The shards that a block reads, counted through the sources."""
        return [
            offset + shard
            for source, offset, (begin, end) in zip(
                self._sources, self._shard_offsets, self._shares(epoch, block), strict=False
            )
            for shard, _, _ in source.spans(begin, end)
        ]

    def largest_share(self, source: int) -> int:
        """The most samples of a source in one block."""
        return -(-self.counts[source] // self._blocks)

    def _begin(self, block: int) -> int:
        """Samples of an epoch before a block."""
        return sum(count * block // self._blocks for count in self.counts)

    def _shares(self, epoch: int, block: int) -> list[tuple[int, int]]:
        """For each source, the part of its endless sequence of passes that a block takes."""
        return [
            (epoch * count + count * block // self._blocks, epoch * count + count * (block + 1) // self._blocks)
            for count in self.counts
        ]

    def _locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, block, samples of the block before it)."""
        epoch, at = divmod(position, self.samples_per_epoch)
        block = at * self._blocks // self.samples_per_epoch
        while self._begin(block) > at:
            block -= 1
        while self._begin(block + 1) <= at:
            block += 1
        return epoch, block, at - self._begin(block)

    def _block(self, epoch: int, block: int) -> NDArray[np.int64]:
        if (epoch, block) not in self._cached:
            parts = [
                offset + source.samples(begin, end)
                for source, offset, (begin, end) in zip(
                    self._sources, self._offsets, self._shares(epoch, block), strict=True
                )
            ]
            members = np.concatenate(parts)
            self._cached = dict(list(self._cached.items())[-1:])  # a step may lie across two blocks
            shuffled = members[permutation(len(members), "block", self._seed, epoch, block)]
            for part in parts[self._finite :]:
                shuffled[np.isin(shuffled, part)] = part
            self._cached[epoch, block] = shuffled
        return self._cached[epoch, block]


class _Endless:
    """A source's endless sequence of samples that are in no shard."""

    def spans(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """As `_Passes.spans`: none."""
        return iter(())

    def samples(self, begin: int, end: int) -> NDArray[np.int64]:
        """As `_Passes.samples`."""
        return np.arange(begin, end)


class _Passes:
    """One source's endless sequence: pass after pass, each with the shards in another order."""

    def __init__(self, source: OrderedSource, seed: int):
        self._source = source
        self._seed = seed
        self._samples = source.samples
        self._firsts = np.cumsum(source.shard_samples) - source.shard_samples
        self._cached: tuple[int, NDArray[np.int64], NDArray[np.int64]] = (-1, np.empty(0), np.empty(0))

    def spans(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, end) of the samples at [begin, end) of the sequence."""
        while begin < end:
            number, at = divmod(begin, self._samples)
            shards, ends = self._pass(number)
            i = int(np.searchsorted(ends, at, side="right"))
            shard = int(shards[i])
            size = int(self._source.shard_samples[shard])
            first = at - (int(ends[i]) - size)
            last = min(size, first + end - begin)
            yield shard, first, last
            begin += last - first

    def samples(self, begin: int, end: int) -> NDArray[np.int64]:
        """Indices, within the source, of the samples at [begin, end) of the sequence."""
        spans = [np.arange(first, last) + self._firsts[shard] for shard, first, last in self.spans(begin, end)]
        return np.concatenate(spans) if spans else np.empty(0, np.int64)

    def _pass(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards in the order of this pass, and where each ends in it."""
        if self._cached[0] != number:
            sizes = self._source.shard_samples
            shards = permutation(len(sizes), "shards", self._seed, self._source.name, number)
            self._cached = number, shards, np.cumsum(sizes[shards])
        return self._cached[1:]
