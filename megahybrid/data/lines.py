"""JSONL, also compressed: a line is a document."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megahybrid.data.documents import Document, Piece, Skipped, Unit, in_file
from megahybrid.errors import UserError


def read_lines(unit: Unit, piece: Piece, path: Path, skipped: Skipped) -> Iterator[tuple[Document | None, int]]:
    """The lines whose first byte is inside the piece, or None for one that holds no text, with the bytes of the file
    since the last one.

    Raises UserError for a .zst file without zstandard; EOFError, OSError or zlib.error for one that cannot be read.
    """
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


def _line(unit: Unit, line: bytes, where: str, skipped: Skipped) -> Document | None:
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
    if not text:
        skipped.note("empty", where)
        return None
    try:
        return in_file(unit, text)
    except UnicodeEncodeError:  # half of a surrogate pair
        skipped.note("not_utf8", where)
        return None


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
