"""Which files hold documents, in which order they are read, and which documents are held out."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from megahybrid.data.order import permutation
from megahybrid.errors import UserError

TRAIN, VALIDATION = "train", "validation"

_HASHES = 2**64
# Text that is held in memory and shuffled at once (JSONL), and tokenised at once.
CHUNK_BYTES = 8_000_000


def draw(*key: str) -> float:
    """A number in [0, 1) that depends only on the key."""
    text = "\0".join(key).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) / _HASHES


@dataclass
class Skipped:
    """What matched but holds no document."""

    empty: int = 0
    """Files or texts without a character."""
    not_utf8: int = 0
    """Files or lines that are not UTF-8."""
    not_json: int = 0
    """Lines that are not a JSON object."""
    no_text: int = 0
    """Lines without a text under the field."""
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
    """A file, or a part of it that begins and ends at any byte: the lines whose first byte is inside are its."""

    name: str
    """The file's path inside the source, with forward slashes."""
    begin: int
    """First byte."""
    end: int
    """Byte after the last."""
    split: str = ""
    """train or validation; empty where every line has its own."""


@dataclass(frozen=True)
class Unit:
    """A part of a source that one worker turns into shards."""

    source: str
    """Name of the source."""
    number: int
    """Its place in the source's order."""
    root: str
    """The source's folder."""
    format: str
    """text or jsonl."""
    field: str
    """jsonl: the key of a line's text."""
    validation_fraction: float
    """jsonl: part of the lines held out."""
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
class Text:
    """A document."""

    split: str
    """train or validation."""
    text: str
    """Exactly as given."""
    bytes: int
    """Its size as UTF-8."""


def list_files(name: str, root: Path, include: list[str], exclude: list[str], skipped: Skipped) -> dict[str, int]:
    """Path below `root`, with forward slashes → size, of the non-empty files that match.

    Raises UserError if the folder is missing or unreadable, or nothing matches.
    """
    if not root.is_dir():
        raise UserError(f"data.sources.{name}.path '{root}' is not a folder; give the folder of its files.")
    files = {}
    for path in _walk(root, set(exclude)):
        if any(fnmatchcase(path.name, pattern) for pattern in include) and path.is_file():
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


def read_unit(unit: Unit, skipped: Skipped, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[list[Text], int]]:
    """The unit's documents in their order, in chunks of about `chunk_bytes`, with the bytes of the source that each
    chunk took.

    Text files come in the order of the pieces; the lines of JSONL are shuffled within a chunk.
    Raises UserError for a file that cannot be read.
    """
    chunk: list[Text] = []
    size, taken, number = 0, 0, 0
    for document, consumed in _documents(unit, skipped):
        taken += consumed
        if document is None:
            continue
        chunk.append(document)
        size += document.bytes
        if size >= chunk_bytes:
            yield _shuffled(chunk, unit, number), taken
            chunk, size, taken, number = [], 0, 0, number + 1
    yield _shuffled(chunk, unit, number), taken


def _shuffled(chunk: list[Text], unit: Unit, number: int) -> list[Text]:
    if unit.format == "text":
        return chunk
    return [chunk[i] for i in permutation(len(chunk), "lines", unit.source, unit.number, number)]


def _documents(unit: Unit, skipped: Skipped) -> Iterator[tuple[Text | None, int]]:
    """Each document, or None for none, with the bytes of the source since the last one."""
    for piece in unit.pieces:
        path = Path(unit.root, piece.name)
        try:
            if unit.format == "text":
                yield _file(piece, path, skipped), piece.end - piece.begin
            else:
                yield from _lines(unit, piece, path, skipped)
        except (OSError, zlib.error) as error:
            raise UserError(
                f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}; make it readable or exclude it."
            ) from error
        except EOFError as error:
            raise UserError(f"'{path}' ends too early; fetch it again or exclude it.") from error


def _file(piece: Piece, path: Path, skipped: Skipped) -> Text | None:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        skipped.note("not_utf8", f"'{path}'")
        return None
    if not text:
        skipped.note("empty", f"'{path}'")
        return None
    return Text(piece.split, text, len(data))


def _lines(unit: Unit, piece: Piece, path: Path, skipped: Skipped) -> Iterator[tuple[Text | None, int]]:
    with open(path, "rb") as file:
        lines = _open(file, path)
        whole = lines is not file
        at = piece.begin
        if at > 0:
            file.seek(at - 1)
            at += len(file.readline()) - 1  # the rest of a line that began before
        taken = piece.begin
        while whole or at < piece.end:
            line = lines.readline()
            if not line:
                break
            here = f"'{path}', byte {at}"
            at += len(line)
            reached = file.tell() if whole else min(at, piece.end)
            yield _line(unit, line, here, skipped), reached - taken
            taken = reached
        yield None, piece.end - taken


def _line(unit: Unit, line: bytes, where: str, skipped: Skipped) -> Text | None:
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        skipped.note("not_utf8", where)
        return None
    except (ValueError, RecursionError):
        skipped.note("not_json", where)
        return None
    text = value.get(unit.field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        skipped.note("no_text" if isinstance(value, dict) else "not_json", where)
        return None
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        skipped.note("not_utf8", where)
        return None
    if not text:
        skipped.note("empty", where)
        return None
    held = unit.validation_fraction > 0 and draw("validation", unit.source, text) < unit.validation_fraction
    return Text(VALIDATION if held else TRAIN, text, size)


def _open(file: IO[bytes], path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(file)
    return io.BufferedReader(_Zstandard(file, path), 1 << 20) if path.suffix == ".zst" else file


class _Zstandard(io.RawIOBase):
    """Reads .zst, of one frame or several. The package's own reader takes a file that was cut for one that ended."""

    def __init__(self, file: IO[bytes], path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"'{path}' needs the package zstandard; `pip install zstandard`, or compress it with gzip."
            ) from error
        self._library = zstandard
        self._file = file
        self._frame: Any = None
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            more = self._file.read(1 << 18)
            if not more:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._plain = memoryview(self._decompress(more))
        size = min(len(buffer), len(self._plain))
        buffer[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size

    def _decompress(self, data: bytes) -> bytes:
        parts = []
        while data:
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                parts.append(self._frame.decompress(data))
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
            data = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        return b"".join(parts)


def is_compressed(name: str) -> bool:
    """Whether only the whole file can be read."""
    return name.endswith((".gz", ".zst"))


def _walk(root: Path, exclude: set[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"'{error.filename}' cannot be listed: {error.strerror}; make it readable or exclude it.")

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in exclude]
        for file in files:
            yield Path(folder, file)
