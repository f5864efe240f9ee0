"""Reading shards by index, safely.

mosaicml-streaming's StreamingDataset is not used: it answers a missing or corrupt shard with a silent end or a hang,
keeps its state in shared memory that outlives a killed run, and orders samples by itself. Here every file is compared
with its index before anything is read from it, the order is order.py's, and the only state is the files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megahybrid.data.fetching import Fetcher
from megahybrid.data.mds import Layout, parse_index
from megahybrid.data.prepared import Prepared
from megahybrid.data.stores import File, Store
from megahybrid.errors import UserError
from megahybrid.retry import retry

# Longer than a store's own deadlines: what hangs is named by the store where that is possible.
_SECONDS = 900.0
_SECONDS_BETWEEN_TOUCHES = 30.0
# A shard that another process throws out of the cache while we read is fetched again so many times.
_ATTEMPTS = 5


@dataclass(frozen=True)
class Shard:
    """A file of samples."""

    file: File
    """Where it lies."""
    samples: int
    """Samples as stored."""
    layout: Layout
    """What its bytes mean."""


class ShardReader:
    """The samples of one split, of the sources given in their order: `reader[i]` → columns.

    A stored sample may be read in equal pieces, which are then what the index counts. Every shard is compared with
    its size, hash and description when this process first reads from it. Faults that pass are waited for.
    """

    def __init__(self, prepared: Prepared | None, store: Store, split: str, sources: Iterable[str], seq_length: int):
        """`seq_length`: tokens of a piece, a divisor of prepared.seq_length; `prepared` may be None without sources.

        Raises UserError, naming the file, for an index or a size that is not what was prepared.
        """
        self.shards: list[Shard] = []
        """All shards, source after source."""
        self.shard_samples: dict[str, NDArray[np.int64]] = {}
        """Source → `[shards]`: pieces that each of its shards holds."""
        self._store = store
        self._length = seq_length
        self._pieces = prepared.seq_length // seq_length if prepared else 1
        for source in sources:
            shards = _index(prepared, store, source, split)
            self.shards += shards
            self.shard_samples[source] = np.array([shard.samples for shard in shards], np.int64) * self._pieces
        store.check_sizes([shard.file for shard in self.shards])
        self._ends = np.cumsum([shard.samples for shard in self.shards])
        self._vocab_size = prepared.vocab_size if prepared else 0
        self._places: dict[int, tuple[str, str]] = {}
        self._touched: dict[int, float] = {}
        self._fetcher = Fetcher(
            self._make_ready,
            lambda number: store.describe(self.shards[number].file.name),
            store.threads,
            _SECONDS,
        )

    def __len__(self) -> int:
        return int(self._ends[-1]) * self._pieces if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, NDArray]:
        """`tokens` `[L + 1]` and `borders`, offsets below L where a sequence begins, 0 first; L is the seq_length.

        Raises UserError for a damaged shard, MachineFault for a disk or server that stays out, IndexError beyond the
        end.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        stored, piece = divmod(int(index), self._pieces)
        number = int(np.searchsorted(self._ends, stored, side="right"))
        shard = self.shards[number]
        sample = self._read(number, stored - (int(self._ends[number]) - shard.samples))
        if self._pieces == 1:
            return sample
        begin = piece * self._length
        inside = sample["borders"][(sample["borders"] > begin) & (sample["borders"] < begin + self._length)] - begin
        return {
            "tokens": sample["tokens"][begin : begin + self._length + 1],
            "borders": np.concatenate([np.zeros(1, np.int32), inside.astype(np.int32)]),
        }

    def shards_of(self, indices: Iterable[int]) -> list[int]:
        """The shards that hold these samples, each once, in the order of first use."""
        stored = np.asarray(list(indices), np.int64) // self._pieces
        return list(dict.fromkeys(np.searchsorted(self._ends, stored, side="right").tolist()))

    def look_ahead(self, shards: Iterable[int]) -> None:
        """Make these shards ready in the background, in this order."""
        shards = list(shards)
        for number in shards:
            if not self._store.touch(self.shards[number].file):  # thrown out since it was ready
                self._fetcher.forget(number)
        self._fetcher.look_ahead(shards)

    def close(self) -> None:
        """End the background threads. Nothing can be read afterwards."""
        self._fetcher.close()

    def _read(self, number: int, index: int) -> dict[str, NDArray]:
        shard = self.shards[number]
        path, what = self._place(number)
        for _ in range(_ATTEMPTS):
            try:
                self._fetcher.require(number)
                self._touch(number)
                sample = retry(lambda: shard.layout.read(path, index), what)
            except FileNotFoundError:
                self._fetcher.forget(number)
                continue
            except (OSError, ValueError) as error:
                raise self._damaged(shard, f"cannot be read ({error})") from error
            if (largest := int(sample["tokens"].max())) >= self._vocab_size:
                raise self._damaged(shard, f"holds token {largest} of a vocabulary of {self._vocab_size}")
            return sample
        raise UserError(
            f"{self._store.describe(shard.file.name)} leaves the cache as soon as it is there; raise data.cache_limit."
        )

    def _make_ready(self, number: int) -> None:
        shard = self.shards[number]
        self._store.fetch(shard.file)
        path, what = self._place(number)
        try:
            retry(lambda: shard.layout.check(path, shard.samples), what)
        except ValueError as error:
            raise self._damaged(shard, f"cannot be read ({error})") from error

    def _place(self, number: int) -> tuple[str, str]:
        """A shard's path, and what begins the sentence of a fault; kept, since every sample needs them."""
        if number not in self._places:
            name = self.shards[number].file.name
            self._places[number] = str(self._store.root / name), f"Reading {self._store.describe(name)}"
        return self._places[number]

    def _touch(self, number: int) -> None:
        now = time.monotonic()
        if now - self._touched.get(number, -_SECONDS_BETWEEN_TOUCHES) >= _SECONDS_BETWEEN_TOUCHES:
            self._touched[number] = now
            self._store.touch(self.shards[number].file)

    def _damaged(self, shard: Shard, fault: str) -> UserError:
        return UserError(f"{self._store.describe(shard.file.name)} {fault}; {self._store.remedy()}.")


def _index(prepared: Prepared, store: Store, source: str, split: str) -> list[Shard]:
    """The shards that index.json lists, if it is the one that dataset.json names."""
    counts = prepared.sources[source][split]
    name = f"{source}/{split}/index.json"
    data = store.read(name, counts.index_sha256)
    try:
        entries = parse_index(data, prepared.seq_length, prepared.token_dtype)
    except ValueError as error:
        raise UserError(f"{store.describe(name)} {error}; {store.remedy()}.") from error
    shards = [
        Shard(File(f"{source}/{split}/{entry.basename}", entry.bytes, entry.xxh64), entry.samples, entry.layout)
        for entry in entries
    ]
    found = sum(shard.samples for shard in shards)
    if found != counts.samples:
        raise UserError(f"{store.describe(name)} lists {found} samples, not {counts.samples}; {store.remedy()}.")
    return shards
