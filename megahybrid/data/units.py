"""A unit of a source → tokens and shards, in a folder that is whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megahybrid.data.documents import TRAIN, VALIDATION, Skipped, Text, Unit, read_unit
from megahybrid.data.stores import File, file_of
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.data.writing import SampleWriter
from megahybrid.files import sync_folder, write_json

_DONE = "done.json"
_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Format:
    """What all units of a `prepare` are written with."""

    tokenizer: str
    """Path of tokenizer.json."""
    seq_length: int
    """L; samples have L + 1 tokens."""
    dtype: str
    """uint16 or uint32."""
    shard_bytes: int
    """The most that a shard holds."""


@dataclass
class UnitCounts:
    """What a unit has come to."""

    documents: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    """Texts of each split."""
    bytes: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    """Of these texts, as UTF-8."""
    tokens: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    """Of these texts, document tokens included."""
    skipped: Skipped = field(default_factory=Skipped)
    """What held no text."""


def write_unit(unit: Unit, made: Format, tokenizer: Tokenizer, folder: Path, advance: Callable[[int], Any]) -> None:
    """Turn a unit into `folder`, in one rename: train/ with its shards, and the tokens that are laid together with
    other units' later: rest.bin, train's tail, and validation.bin. `advance(bytes)` is told how far the source is read.

    Raises UserError for a file that cannot be read.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        counts = UnitCounts()
        with (
            SampleWriter(part / TRAIN, made.seq_length, made.dtype, made.shard_bytes) as writer,
            open(part / "validation.bin", "wb") as validation,
        ):
            for texts, taken in read_unit(unit, counts.skipped):
                _add(texts, tokenizer, made.dtype, counts, writer, validation)
                advance(taken)
        rest = writer.rest
        if len(rest) and rest[0] != tokenizer.document_id:  # it will follow another unit's document
            rest = np.concatenate([np.array([tokenizer.document_id], made.dtype), rest])
        (part / "rest.bin").write_bytes(rest.tobytes())
        _finish(part, counts)
        if finished_unit(folder) is None:  # else a worker whose parent was killed came first, with the same
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def finished_unit(folder: Path) -> UnitCounts | None:
    """What a finished unit's folder holds; None if it is not there or not whole, whatever the reason."""
    try:
        done = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        files = [File(**facts) for facts in done["files"]]
        if any(file.fault(folder / file.name) for file in files):
            return None
        counts = done["counts"]
        return UnitCounts(**{**counts, "skipped": Skipped(**counts["skipped"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def documents_in(folders: list[Path], name: str, dtype: str, document_id: int) -> Iterator[list[NDArray]]:
    """The documents of rest.bin or validation.bin over all units, some at a time."""
    width = np.dtype(dtype).itemsize
    carried = np.empty(0, dtype)
    for folder in folders:
        with open(folder / name, "rb") as file:
            while data := file.read(_TOKENS_AT_ONCE * width):
                tokens = np.concatenate([carried, np.frombuffer(data, dtype)])
                starts = np.flatnonzero(tokens == document_id)
                yield np.split(tokens[: starts[-1]], starts[1:-1]) if len(starts) > 1 else []
                carried = tokens[starts[-1] :]
    if len(carried):
        yield [carried]


def _add(
    texts: list[Text],
    tokenizer: Tokenizer,
    dtype: str,
    counts: UnitCounts,
    writer: SampleWriter,
    validation: IO[bytes],
) -> None:
    encoded = tokenizer.encode_batch([text.text for text in texts])
    documents = [np.array([tokenizer.document_id, *ids], dtype) for ids in encoded]
    for text, document in zip(texts, documents, strict=True):
        counts.documents[text.split] += 1
        counts.bytes[text.split] += text.bytes
        counts.tokens[text.split] += len(document)
        if text.split == VALIDATION:
            validation.write(document.tobytes())
    writer.add([document for text, document in zip(texts, documents, strict=True) if text.split == TRAIN])


def _finish(part: Path, counts: UnitCounts) -> None:
    """Make all files durable and note their sizes and hashes: a unit that is there is whole."""
    files = []
    for path in sorted(path for path in part.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files.append(asdict(file_of(path, path.relative_to(part).as_posix())))
    write_json(part / _DONE, {"counts": asdict(counts), "files": files})
    sync_folder(part / TRAIN)
    sync_folder(part)
