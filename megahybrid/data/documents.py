"""Which files hold documents, in which order they are read, and which documents are held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megahybrid.errors import UserError

TRAIN, VALIDATION = "train", "validation"

_HASHES = 2**64


def draw(*key: str) -> float:
    """A number in [0, 1) that depends only on the key."""
    text = "\0".join(key).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) / _HASHES


@dataclass
class Skipped:
    """What a source has and no document is made of."""

    other_names: int = 0
    """Files of a source's folder that its include leaves out."""
    empty: int = 0
    """Files or texts without a character."""
    not_utf8: int = 0
    """Files, lines or rows that are not UTF-8."""
    not_json: int = 0
    """Lines that are not a JSON object."""
    no_text: int = 0
    """Lines or rows without a text under the field."""
    example: str = ""
    """Where the first of them is."""

    @property
    def bad(self) -> int:
        """All that should have held text."""
        return self.not_utf8 + self.not_json + self.no_text

    def add(self, other: Skipped) -> None:
        """Count another part's in."""
        for each in fields(self):
            if each.name != "example":
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        self.example = self.example or other.example

    def note(self, kind: str, where: str) -> None:
        """Count one."""
        setattr(self, kind, getattr(self, kind) + 1)
        if kind != "empty":
            self.example = self.example or where


@dataclass(frozen=True)
class Piece:
    """A file, or a part of it that begins and ends at any byte: the documents that begin inside are its."""

    name: str
    """The file's path inside the source, with forward slashes."""
    begin: int
    """First byte."""
    end: int
    """Byte after the last."""
    split: str = ""
    """train or validation; empty where every document in the file has its own."""


@dataclass(frozen=True)
class Unit:
    """A part of a source that one worker turns into tokens."""

    source: str
    """Name of the source."""
    number: int
    """Its place in the source's order."""
    root: str
    """The source's folder, or that of its single file."""
    format: str
    """text, jsonl, parquet, npy or bin."""
    field: str
    """jsonl: the key of a line's text; parquet: its column."""
    validation_fraction: float
    """All but text: part of the documents held out."""
    dtype: str | None = None
    """bin: uint16 or uint32."""
    eos_token_id: int | None = None
    """npy, bin: the token that ends a document; the tokenizer's document token if None."""
    pieces: list[Piece] = field(default_factory=list)
    """In the order in which they are read."""

    @property
    def bytes(self) -> int:
        """Size of its pieces."""
        return sum(piece.end - piece.begin for piece in self.pieces)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Unit:
        """From plain values."""
        return cls(**{**values, "pieces": [Piece(**piece) for piece in values["pieces"]]})


@dataclass(frozen=True)
class Document:
    """A document, as text or as tokens."""

    split: str
    """train or validation."""
    bytes: int
    """Size of its text as UTF-8."""
    text: str = ""
    """Exactly as given; empty where there are tokens."""
    tokens: NDArray | None = None
    """`[n]`: its ids if the source is tokenised, without those that mark its borders."""


def in_file(unit: Unit, text: str, tokens: NDArray | None = None) -> Document:
    """A document of a file of many. Its side follows from its text and the source's name: it is the same in every
    format, for every tokenizer, and for equal documents.

    Raises UnicodeEncodeError for a text that has no UTF-8.
    """
    size = len(text.encode())
    held = unit.validation_fraction > 0 and draw("validation", unit.source, text) < unit.validation_fraction
    return Document(VALIDATION if held else TRAIN, size, text if tokens is None else "", tokens)


def list_files(name: str, root: Path, include: list[str], exclude: list[str], skipped: Skipped) -> dict[str, int]:
    """Path below `root`, with forward slashes → size, of the non-empty files that match.

    Raises UserError if the folder is missing or unreadable, or nothing matches.
    """
    if not root.is_dir():
        raise UserError(f"data.sources.{name}.path '{root}' is not a folder or a file; give what holds its documents.")
    files = {}
    for path in _walk(root, set(exclude)):
        if matched(path.name, include) is None:
            skipped.other_names += 1
        elif path.is_file():
            size = path.stat().st_size
            skipped.empty += size == 0
            if size:
                files[path.relative_to(root).as_posix()] = size
    if not files:
        raise UserError(
            f"data.sources.{name} finds no text in '{root}' that matches [{', '.join(include)}]; "
            "change its path, include or exclude."
        )
    return files


def matched(name: str, patterns: list[str]) -> str | None:
    """The first pattern that a file's name matches."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def split_names(source: str, names: list[str], fraction: float) -> set[str]:
    """The names that are held out.

    A name's side depends on the source and itself only. With two names or more, neither side is empty when
    0 < fraction < 1; a single one is trained on.
    """
    if len(names) < 2:
        return set()
    draws = {name: draw("validation", source, name) for name in names}
    held = {name for name, number in draws.items() if number < fraction}
    if fraction > 0 and not held:
        held = {min(draws, key=draws.__getitem__)}
    if len(held) == len(names):
        held.remove(max(draws, key=draws.__getitem__))
    return held


def _walk(root: Path, exclude: set[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"'{error.filename}' cannot be listed: {error.strerror}; make it readable or exclude it.")

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in exclude]
        for file in files:
            yield Path(folder, file)
