"""Parquet: a row is a document, its text that of one column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megahybrid.data.documents import Document, Piece, Skipped, Unit, in_file
from megahybrid.errors import UserError

# Rows that are decoded, and bytes that are read, at once: a row group may be a whole file.
_ROWS = 128
_BUFFER_BYTES = 1 << 20
# The first without column types that a file describes by a pickle (before 14.0.1 opening it ran that: CVE-2023-47248).
_OLDEST = 21


def pyarrow(source: str) -> ModuleType:
    """The library, with its parquet part. Raises UserError if it is missing or so old that a file can run code."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"data.sources.{source}.format is parquet, which needs the package pyarrow; "
            f"`pip install 'pyarrow>={_OLDEST}'`."
        ) from error
    if int(pyarrow.__version__.split(".")[0]) < _OLDEST:
        raise UserError(
            f"data.sources.{source}.format is parquet, and a file of it can run code in pyarrow {pyarrow.__version__}; "
            f"`pip install 'pyarrow>={_OLDEST}'`."
        )
    return pyarrow


def read_rows(unit: Unit, piece: Piece, path: Path, skipped: Skipped) -> Iterator[tuple[Document | None, int]]:
    """The rows of the piece's row groups, or None for one that holds no text, with the bytes of the file since the
    last one. Of n row groups of a file of s bytes, number i is taken to begin at byte i * s // n.

    Raises UserError for a file that is not whole or not parquet, and for one without a column of text under the field.
    """
    library = pyarrow(unit.source)
    try:
        with library.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            yield from _rows(unit, piece, path, skipped, file)
    except (library.ArrowException, OSError, EOFError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # of the disk, not of what is in the file
        reason = " ".join(str(error).split()).split(". ")[0][:200].rstrip(".")
        raise UserError(f"'{path}' is not a readable parquet file ({reason}); fetch it again or exclude it.") from error


def _rows(unit: Unit, piece: Piece, path: Path, skipped: Skipped, file: Any) -> Iterator[tuple[Document | None, int]]:
    _require_text(unit, path, file.schema_arrow)
    size, count, taken = path.stat().st_size, file.num_row_groups, piece.begin
    for group in range(count):
        if not piece.begin <= group * size // count < piece.end:
            continue
        row = 0
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[unit.field], use_threads=False):
            for value in _bytes(batch.column(0)):
                yield _row(unit, value, f"'{path}', row group {group}, row {row}", skipped), 0
                row += 1
        reached = min((group + 1) * size // count, piece.end)
        yield None, reached - taken
        taken = reached
    yield None, piece.end - taken


def _require_text(unit: Unit, path: Path, schema: Any) -> None:
    types = pyarrow(unit.source).types
    key = f"data.sources.{unit.source}.field"
    columns = schema.get_all_field_indices(unit.field)
    if len(columns) != 1:
        named = ", ".join(f"'{name}'" for name in schema.names[:20])
        many = f"has {len(columns)} columns" if columns else "has no column"
        raise UserError(f"'{path}' {many} '{unit.field}'; set {key} to one of its columns ({named}).")
    kind = schema.field(columns[0]).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"'{path}' has {kind} in its column '{unit.field}', not text; set {key} to a column of text.")


def _bytes(column: Any) -> list[bytes | None]:
    """The texts as the file has them: pyarrow takes them for UTF-8 unseen."""
    return column.cast("large_binary").to_pylist()


def _row(unit: Unit, value: bytes | None, where: str, skipped: Skipped) -> Document | None:
    if value is None:
        skipped.note("no_text", where)
        return None
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        skipped.note("not_utf8", where)
        return None
    if not text:
        skipped.note("empty", where)
        return None
    return in_file(unit, text)
