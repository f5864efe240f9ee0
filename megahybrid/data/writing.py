"""Documents laid end to end, cut into samples, written as MDS shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megahybrid.data.mds import Layout, index_of

# Small enough that a block of the order has samples of several shards, large enough for object stores.
SHARD_BYTES = 1 << 25


class SampleWriter:
    """Cuts a stream of documents into samples and writes them.

    Sample i is `stream[i * L : (i + 1) * L + 1]` with L = seq_length, so that its last token is the next one's first
    and only a label here. Columns: `tokens` `[L + 1]`, and `borders` int32, the offsets below L where a sequence
    begins: 0 first (MDS cannot store an empty array), then every document's first token. A tail shorter than L + 1
    stays in `rest`.
    """

    def __init__(self, folder: Path, seq_length: int, dtype: str, shard_bytes: int | None = None):
        """`shard_bytes`: the most that a shard holds, SHARD_BYTES when left out."""
        self._length = seq_length
        self._dtype = dtype
        self.rest = np.empty(0, dtype)
        """The tokens that do not fill a sample yet."""
        self._rest_starts = np.empty(0, np.int64)
        self.samples = 0
        """Written so far."""
        self._shards = _Shards(folder, Layout(seq_length, dtype, shard_bytes or SHARD_BYTES))

    def add(self, documents: Sequence[Sequence[int] | NDArray]) -> None:
        """Append documents, each beginning with the document token."""
        if not documents:
            return
        arrays = [np.asarray(document, self._dtype) for document in documents]
        ends = len(self.rest) + np.cumsum([len(array) for array in arrays])
        starts = np.concatenate([self._rest_starts, ends - [len(array) for array in arrays]])
        stream = np.concatenate([self.rest, *arrays])
        count = max(len(stream) - 1, 0) // self._length
        firsts = np.searchsorted(starts, np.arange(count + 1) * self._length)
        for i in range(count):
            self._write(stream, starts[firsts[i] : firsts[i + 1]], i * self._length)
        self.rest = stream[count * self._length :].copy()
        self._rest_starts = starts[firsts[count] :] - count * self._length

    def _write(self, stream: NDArray, starts: NDArray[np.int64], begin: int) -> None:
        borders = (starts - begin).astype(np.int32)
        if not len(borders) or borders[0] != 0:
            borders = np.concatenate([np.zeros(1, np.int32), borders])
        self._shards.write(stream[begin : begin + self._length + 1], borders)
        self.samples += 1

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._shards.finish()


class _Shards:
    """Writes shards and their index."""

    def __init__(self, folder: Path, layout: Layout):
        self._folder = folder
        self._layout = layout
        self._entries: list[dict[str, Any]] = []
        self._samples: list[bytes] = []
        self._size = self._empty = layout.head_bytes(0)
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, tokens: NDArray, borders: NDArray[np.int32]) -> None:
        """Append a sample."""
        sample = self._layout.encode(tokens, borders)
        if self._size + len(sample) + 4 > self._layout.size_limit:
            self._flush()
        self._samples.append(sample)
        self._size += len(sample) + 4

    def finish(self) -> None:
        """Write what is left, and the index."""
        self._flush()
        (self._folder / "index.json").write_text(index_of(self._entries), encoding="utf-8")

    def _flush(self) -> None:
        if not self._samples:
            return
        data = self._layout.shard(self._samples)
        entry = self._layout.entry(len(self._entries), len(self._samples), len(data), xxhash.xxh64(data).hexdigest())
        (self._folder / entry["raw_data"]["basename"]).write_bytes(data)
        self._entries.append(entry)
        self._samples, self._size = [], self._empty
