"""The one kind of shard that `prepare` writes and training reads: MDS with a sample's two columns.

MDS is mosaicml-streaming's format, version 2. A shard is `[samples: uint32][offset of each sample and of the end:
uint32][its description as JSON][samples]`, a sample `[bytes of borders: uint32][borders][tokens]`, and borders are
`[code of the width][how many, in 1, 2 or 4 bytes][int32 each]`. The library takes seconds and 700 MB to import and
decodes whatever an index names, pickles included. Here an index and a shard are what `prepare` would have written for
the same numbers, or they are refused. The tests compare with the library in both directions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

HASH = "xxh64"

# Offsets are uint32.
_LARGEST_SHARD = (1 << 32) - 1
_WIDTHS = {4: 1, 5: 2, 6: 4}  # one dimension, and the type of its size


def token_dtype(vocab_size: int) -> str:
    """The smallest dtype that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_name(number: int) -> str:
    """The file of an index's shard `number`."""
    return f"shard.{number:05}.mds"


@dataclass(frozen=True)
class Layout:
    """What the bytes of a shard mean."""

    seq_length: int
    """L; a sample has L + 1 tokens."""
    dtype: str
    """Of the tokens: uint16 or uint32."""
    size_limit: int
    """The bytes that its writer kept to."""

    @cached_property
    def description(self) -> dict[str, Any]:
        """As it stands in the shard, and in the index for every shard."""
        return {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [HASH],
            "size_limit": self.size_limit,
            "column_names": ["borders", "tokens"],
            "column_encodings": ["ndarray:int32", f"ndarray:{self.dtype}:{self.seq_length + 1}"],
            "column_sizes": [None, self._token_bytes],
        }

    @cached_property
    def header(self) -> bytes:
        """The description's bytes."""
        return json.dumps(self.description, sort_keys=True).encode()

    @cached_property
    def _token_bytes(self) -> int:
        return (self.seq_length + 1) * np.dtype(self.dtype).itemsize

    @cached_property
    def _sample_bytes(self) -> tuple[int, int]:
        """The least and the most that a sample takes."""
        return 4 + 2 + 4 + self._token_bytes, 4 + 5 + 4 * self.seq_length + self._token_bytes

    def head_bytes(self, samples: int) -> int:
        """Bytes before the first sample."""
        return 4 + 4 * (samples + 1) + len(self.header)

    def entry(self, number: int, samples: int, size: int, xxh64: str) -> dict[str, Any]:
        """What index.json says of its shard `number`."""
        raw = {"basename": shard_name(number), "bytes": size, "hashes": {HASH: xxh64}}
        return {**self.description, "samples": samples, "raw_data": raw, "zip_data": None}

    def encode(self, tokens: NDArray, borders: NDArray[np.int32]) -> bytes:
        """A sample: `tokens` `[L + 1]` and `borders`, at least one of them."""
        count = len(borders)
        code = 4 if count < 1 << 8 else 5 if count < 1 << 16 else 6
        column = bytes([code]) + count.to_bytes(_WIDTHS[code], "little") + borders.tobytes()
        return len(column).to_bytes(4, "little") + column + tokens.tobytes()

    def decode(self, sample: bytes) -> dict[str, NDArray]:
        """The reverse: `tokens` `[L + 1]` and `borders`, ascending from 0 and below L.

        Raises ValueError for bytes that `encode` does not give.
        """
        end = 4 + int.from_bytes(sample[:4], "little")
        width = _WIDTHS.get(sample[4] if len(sample) > 4 else 0, 0)
        first = 5 + width
        count = int.from_bytes(sample[5:first], "little")
        if not width or count < 1 or end != first + 4 * count or len(sample) != end + self._token_bytes:
            raise ValueError("a sample is not made of borders and tokens")
        borders = np.frombuffer(sample[first:end], np.int32)
        if borders[0] != 0 or borders[-1] >= self.seq_length or (count > 1 and not (borders[1:] > borders[:-1]).all()):
            raise ValueError(f"its borders do not ascend from 0 to below {self.seq_length}")
        return {"tokens": np.frombuffer(sample[end:], self.dtype), "borders": borders}

    def shard(self, samples: Sequence[bytes]) -> bytes:
        """A whole shard of encoded samples."""
        sizes = [len(sample) for sample in samples]
        offsets = np.cumsum([self.head_bytes(len(sizes)), *sizes]).astype(np.uint32)
        return b"".join([np.uint32(len(sizes)).tobytes(), offsets.tobytes(), self.header, *samples])

    def fits(self, samples: int, size: int) -> bool:
        """Whether so many samples can take so many bytes."""
        least, most = (self.head_bytes(samples) + samples * each for each in self._sample_bytes)
        return least <= size <= min(most, _LARGEST_SHARD)

    def check(self, path: str, samples: int) -> None:
        """Compare all of a shard but its samples. Raises ValueError, and OSError if it cannot be read."""
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = _read(handle, self.head_bytes(samples), 0)
            size = os.fstat(handle).st_size
        finally:
            os.close(handle)
        if len(head) != self.head_bytes(samples) or int.from_bytes(head[:4], "little") != samples:
            raise ValueError(f"it does not hold {samples} samples")
        if head[8 + 4 * samples :] != self.header:
            raise ValueError("its own description is not that of its index")
        offsets = np.frombuffer(head, np.uint32, samples + 1, 4).astype(np.int64)
        sizes, (least, most) = np.diff(offsets), self._sample_bytes
        if offsets[0] != len(head) or offsets[-1] != size or sizes.min() < least or sizes.max() > most:
            raise ValueError("its offsets do not cut it into samples")

    def read(self, path: str, index: int) -> dict[str, NDArray]:
        """Sample `index` of a shard that was checked before; see `decode`.

        Raises ValueError if the shard has changed, and OSError if it cannot be read: read and not mapped, because a
        fault of the disk under a mapped file is no error but a signal that ends the process.
        """
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            pair = _read(handle, 8, 4 + 4 * index)
            begin, end = int.from_bytes(pair[:4], "little"), int.from_bytes(pair[4:], "little")
            if not self._sample_bytes[0] <= end - begin <= self._sample_bytes[1]:
                raise ValueError("it has changed since it was checked")
            return self.decode(_read(handle, end - begin, begin))
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Entry:
    """A shard as its index describes it."""

    basename: str
    """Name of the file beside the index."""
    bytes: int
    """Its size."""
    xxh64: str
    """Its hash."""
    samples: int
    """Samples in it."""
    layout: Layout
    """What its bytes mean."""


def index_of(entries: Sequence[dict[str, Any]]) -> str:
    """The text of an index.json."""
    return json.dumps({"version": 2, "shards": entries}, sort_keys=True)


def parse_index(text: bytes, seq_length: int, dtype: str) -> list[Entry]:
    """The shards of an index.json. Raises ValueError, as the end of a sentence, for one that `prepare` does not write.

    Nothing of the text is used before it was compared: names, encodings, sizes, hashes and compression are ours.
    """
    try:
        shards = json.loads(text)["shards"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("is unreadable") from error
    if not isinstance(shards, list):
        raise ValueError("is unreadable")
    layouts: dict[int, Layout] = {}
    return [_entry(number, found, seq_length, dtype, layouts) for number, found in enumerate(shards)]


def _entry(number: int, found: Any, seq_length: int, dtype: str, layouts: dict[int, Layout]) -> Entry:
    raw = found.get("raw_data") if isinstance(found, dict) else None
    if not isinstance(raw, dict) or not isinstance(raw.get("hashes"), dict):
        raise ValueError(f"has a shard {number} without size and hash")
    limit, samples = found.get("size_limit"), found.get("samples")
    size, xxh64 = raw.get("bytes"), raw["hashes"].get(HASH)
    for name, value in (("size_limit", limit), ("samples", samples), ("bytes", size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"has {name} {_shown(value)} in shard {number}")
    if not isinstance(xxh64, str) or not re.fullmatch("[0-9a-f]{16}", xxh64):
        raise ValueError(f"has no {HASH} hash in shard {number}")
    layout = layouts.setdefault(limit, Layout(seq_length, dtype, limit))
    expected = layout.entry(number, samples, size, xxh64)
    if found != expected:
        ours, theirs = _flat(expected), _flat(found)
        key = min(key for key in ours.keys() | theirs.keys() if ours.get(key, ours) != theirs.get(key, ours))
        raise ValueError(f"has {_shown(key)} {_shown(theirs.get(key))} in shard {number}, which prepare does not write")
    if not layout.fits(samples, size):
        raise ValueError(f"gives its shard {number} {_shown(size)} bytes, which {_shown(samples)} samples cannot take")
    return Entry(expected["raw_data"]["basename"], size, xxh64, samples, layout)


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "raw_data": None, **{f"raw_data.{key}": value for key, value in entry["raw_data"].items()}}


def _shown(value: Any) -> str:
    """A foreign value on one line of a message."""
    text = value if isinstance(value, str) and re.fullmatch(r"[\w.]+", value, re.ASCII) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _read(handle: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes, fewer at the file's end only."""
    data = os.pread(handle, size, offset)
    while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
        data += more
    return data
