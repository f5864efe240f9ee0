"""A unit of a source → its documents, whatever the format."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from megahybrid.data.documents import Document, Piece, Skipped, Unit
from megahybrid.data.lines import read_lines
from megahybrid.data.parquet import read_rows
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.data.tokens import TOKENISED, read_tokens
from megahybrid.errors import MachineFault, UserError
from megahybrid.retry import is_transient

# Text that is held in memory and tokenised at once.
CHUNK_BYTES = 8_000_000


def read_unit(
    unit: Unit, skipped: Skipped, tokenizer: Tokenizer | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[list[Document], int]]:
    """The unit's documents in their order, in chunks of about `chunk_bytes` of text, with the bytes of the source that
    each chunk took. Sources that are tokenised need the tokenizer they were made with.

    Raises UserError for a file that cannot be read.
    """
    chunk: list[Document] = []
    size, taken = 0, 0
    for document, consumed in _documents(unit, skipped, tokenizer):
        taken += consumed
        if document is None:
            continue
        chunk.append(document)
        size += document.bytes
        if size >= chunk_bytes:
            yield chunk, taken
            chunk, size, taken = [], 0, 0
    yield chunk, taken


def _documents(unit: Unit, skipped: Skipped, tokenizer: Tokenizer | None) -> Iterator[tuple[Document | None, int]]:
    """Each document, or None for none, with the bytes of the source since the last one."""
    for piece in unit.pieces:
        path = Path(unit.root, piece.name)
        try:
            if unit.format == "text":
                yield _file(piece, path, skipped), piece.end - piece.begin
            elif unit.format == "jsonl":
                yield from read_lines(unit, piece, path, skipped)
            elif unit.format == "parquet":
                yield from read_rows(unit, piece, path, skipped)
            else:
                assert unit.format in TOKENISED and tokenizer is not None
                yield from read_tokens(unit, piece, path, tokenizer)
        except (OSError, zlib.error) as error:
            if is_transient(error):
                raise MachineFault(
                    f"'{path}' cannot be read now ({getattr(error, 'strerror', None) or error}); run prepare again: "
                    "it goes on from what it has."
                ) from error
            raise UserError(
                f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}; make it readable or exclude it."
            ) from error
        except EOFError as error:
            raise UserError(f"'{path}' ends too early; fetch it again or exclude it.") from error


def _file(piece: Piece, path: Path, skipped: Skipped) -> Document | None:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        skipped.note("not_utf8", f"'{path}'")
        return None
    if not text:
        skipped.note("empty", f"'{path}'")
        return None
    return Document(piece.split, len(data), text)
