"""Documents laid end to end, cut into samples, written as MDS shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

# Small enough that a few shards fit into the block that streaming shuffles in, large enough for object stores.
SHARD_BYTES = 1 << 25
HASH = "xxh64"


def token_dtype(vocab_size: int) -> str:
    """The smallest dtype that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class SampleWriter:
    """Cuts a stream of documents into samples and writes them.

    Sample i is `stream[i * L : (i + 1) * L + 1]` with L = seq_length, so that its last token is the next one's first
    and only a label here. Columns: `tokens` `[L + 1]`, and `borders` int32, the offsets below L where a sequence
    begins: 0 first (MDS cannot store an empty array), then every document's first token. A tail shorter than L + 1 is
    dropped.
    """

    def __init__(self, folder: Path, seq_length: int, dtype: str):
        from streaming import MDSWriter  # takes seconds, which only `prepare` should pay

        self._length = seq_length
        self._dtype = dtype
        self._rest = np.empty(0, dtype)
        self._rest_starts = np.empty(0, np.int64)
        self.samples = 0
        """Written so far."""
        self._writer = MDSWriter(
            columns={"tokens": f"ndarray:{dtype}:{seq_length + 1}", "borders": "ndarray:int32"},
            out=str(folder),
            hashes=[HASH],
            size_limit=SHARD_BYTES,
        )

    def add(self, documents: Sequence[Sequence[int]]) -> None:
        """Append documents, each beginning with the document token."""
        if not documents:
            return
        arrays = [np.asarray(document, self._dtype) for document in documents]
        ends = len(self._rest) + np.cumsum([len(array) for array in arrays])
        starts = np.concatenate([self._rest_starts, ends - [len(array) for array in arrays]])
        stream = np.concatenate([self._rest, *arrays])
        count = max(len(stream) - 1, 0) // self._length
        firsts = np.searchsorted(starts, np.arange(count + 1) * self._length)
        for i in range(count):
            self._write(stream, starts[firsts[i] : firsts[i + 1]], i * self._length)
        self._rest = stream[count * self._length :].copy()
        self._rest_starts = starts[firsts[count] :] - count * self._length

    def _write(self, stream: NDArray, starts: NDArray[np.int64], begin: int) -> None:
        borders = (starts - begin).astype(np.int32)
        if not len(borders) or borders[0] != 0:
            borders = np.concatenate([np.zeros(1, np.int32), borders])
        self._writer.write({"tokens": stream[begin : begin + self._length + 1], "borders": borders})
        self.samples += 1

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.finish()
