"""A unit of a source → its tokens, in a folder that is whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megahybrid.data.documents import TRAIN, VALIDATION, Document, Skipped, Unit
from megahybrid.data.reading import read_unit
from megahybrid.data.stores import File, file_of
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.files import sync_folder, write_json

_DONE = "done.json"
_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Format:
    """What all parts of a `prepare` are written with."""

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
    """Of each split."""
    bytes: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    """Of their texts, as UTF-8."""
    tokens: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    """Of these documents, document tokens included."""
    skipped: Skipped = field(default_factory=Skipped)
    """What held no text."""


def write_unit(unit: Unit, made: Format, tokenizer: Tokenizer, folder: Path, advance: Callable[[int], Any]) -> None:
    """Turn a unit into `folder`, whole: train.bin and validation.bin, the tokens of its documents in their order, each
    with the document token before it. `advance(bytes)` is told how far the source is read.

    Raises UserError for a file that cannot be read.
    """
    with whole_folder(folder) as part:
        counts = UnitCounts()
        with open(part / "train.bin", "wb") as train, open(part / "validation.bin", "wb") as validation:
            files: dict[str, IO[bytes]] = {TRAIN: train, VALIDATION: validation}
            for documents, taken in read_unit(unit, counts.skipped, tokenizer):
                _add(documents, tokenizer, made.dtype, counts, files)
                advance(taken)
        finish(part, asdict(counts))


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill and to `finish`, which then appears as `folder` in one rename."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if finished(folder) is None:  # else a worker whose parent was killed came first, with the same
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def finished(folder: Path) -> dict[str, Any] | None:
    """The facts that a finished folder was left with; None if it is not there or not whole, whatever the reason."""
    try:
        done = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        files = [File(**facts) for facts in done["files"]]
        return None if any(file.fault(folder / file.name) for file in files) else done["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finished_unit(folder: Path) -> UnitCounts | None:
    """What a finished unit has come to; None as in `finished`."""
    facts = finished(folder)
    return None if facts is None else UnitCounts(**{**facts, "skipped": Skipped(**facts["skipped"])})


def documents_in(folders: list[Path], name: str, dtype: str, document_id: int) -> Iterator[list[NDArray]]:
    """The documents of such a file of all folders, some at a time."""
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
    documents: list[Document], tokenizer: Tokenizer, dtype: str, counts: UnitCounts, files: dict[str, IO[bytes]]
) -> None:
    texts = [document.text for document in documents if document.tokens is None]
    encoded = iter(tokenizer.encode_batch(texts))
    for document in documents:
        ids = next(encoded) if document.tokens is None else document.tokens
        tokens = np.empty(len(ids) + 1, dtype)
        tokens[0], tokens[1:] = tokenizer.document_id, ids
        counts.documents[document.split] += 1
        counts.bytes[document.split] += document.bytes
        counts.tokens[document.split] += len(tokens)
        files[document.split].write(tokens.tobytes())


def finish(part: Path, facts: dict[str, Any]) -> None:
    """Make all files durable and note their sizes and hashes: a folder that is there is whole."""
    files = []
    for path in sorted(path for path in part.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files.append(asdict(file_of(path, path.relative_to(part).as_posix())))
    write_json(part / _DONE, {"facts": facts, "files": files})
    for path in part.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(part)
