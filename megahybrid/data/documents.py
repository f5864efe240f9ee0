"""Which files are documents, in which order, and which of them are held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megahybrid.config.schema import SourceConfig
from megahybrid.errors import UserError

_HASHES = 2**64


@dataclass(frozen=True)
class Document:
    """A file of text."""

    source: str
    """Name of its source."""
    name: str
    """Path inside the source, with forward slashes."""
    path: Path
    """Where it lies."""
    bytes: int
    """Its size."""

    def draw(self, purpose: str) -> float:
        """A number in [0, 1) that depends only on the purpose, the source and the name."""
        text = "\0".join((purpose, self.source, self.name)).encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) / _HASHES


@dataclass
class Skipped:
    """Files that matched but hold no document."""

    empty: int = 0
    """Without a byte."""
    not_utf8: int = 0
    """Not UTF-8."""


def list_documents(name: str, source: SourceConfig, skipped: Skipped) -> list[Document]:
    """The source's non-empty files in a shuffled order that depends on their names only.

    Raises UserError if the folder is missing or unreadable, or holds no text that matches.
    """
    root = Path(source.path).expanduser()
    if not root.is_dir():
        raise UserError(f"data.sources.{name}.path '{source.path}' is not a folder; give the folder of the text files.")
    documents = []
    for path in _walk(root, set(source.exclude)):
        if any(fnmatchcase(path.name, pattern) for pattern in source.include) and path.is_file():
            size = path.stat().st_size
            skipped.empty += size == 0
            if size:
                documents.append(Document(name, path.relative_to(root).as_posix(), path, size))
    if not documents:
        raise UserError(
            f"data.sources.{name} finds no text in '{source.path}' that matches [{', '.join(source.include)}]; "
            "change its path, include or exclude."
        )
    return sorted(documents, key=lambda document: (document.draw("order"), document.name))


def split_documents(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Train and validation documents, in the order given.

    A document's side depends on its source and name only. With two documents or more, neither side is empty when
    0 < fraction < 1; a single document is trained on.
    """
    if len(documents) < 2:
        return documents, []
    draws = {document: document.draw("validation") for document in documents}
    held = {document for document, draw in draws.items() if draw < fraction}
    if fraction > 0 and not held:
        held = {min(draws, key=draws.__getitem__)}
    if len(held) == len(documents):
        held.remove(max(draws, key=draws.__getitem__))
    return [document for document in documents if document not in held], [d for d in documents if d in held]


def read_documents(documents: Iterable[Document], skipped: Skipped) -> Iterator[tuple[Document, str]]:
    """Each document with its text, exactly as in the file; what is not UTF-8 is counted and passed over.

    Raises UserError for a file that cannot be read.
    """
    for document in documents:
        try:
            text = document.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped.not_utf8 += 1
            continue
        except OSError as error:
            raise UserError(
                f"'{document.path}' cannot be read: {error.strerror}; make it readable or exclude it."
            ) from error
        if text:
            yield document, text


def _walk(root: Path, exclude: set[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"'{error.filename}' cannot be listed: {error.strerror}; make it readable or exclude it.")

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in exclude]
        for file in files:
            yield Path(folder, file)
