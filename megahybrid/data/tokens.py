"""Files of token ids, one after another, in which a token marks where documents end: .npy arrays and bare .bin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from megahybrid.data.documents import Document, Piece, Unit, in_file
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import UserError

TOKENISED = ("npy", "bin")

# Tokens that are read at once.
_WINDOW = 1 << 20
# A document of more tokens is held to be none.
_LONGEST = 1 << 26
# What llm.c begins a .bin with: 256 int32, of which the first three are this, a version and the number of tokens.
_LLM_C = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
_LLM_C_BYTES = 1024


@dataclass(frozen=True)
class _Array:
    """Where a file's tokens lie."""

    dtype: np.dtype
    offset: int
    """Bytes before the first."""
    count: int


def read_tokens(unit: Unit, piece: Piece, path: Path, tokenizer: Tokenizer) -> Iterator[tuple[Document | None, int]]:
    """The documents whose first token is inside the piece, with the bytes of the file since the last one.

    A document is what lies between two border tokens, those of unit.eos_token_id and of the tokenizer's document token,
    or between one and an end of the file: they may stand before documents, after them, or both. Nothing between two is
    no document.
    Raises UserError for a file that is not whole or not an array of ids, for a token outside the vocabulary, and for a
    file without borders.
    """
    borders = {tokenizer.document_id, tokenizer.document_id if unit.eos_token_id is None else unit.eos_token_id}
    with open(path, "rb") as file:
        array = _npy(file, path) if unit.format == "npy" else _bare(unit, file, path)
        width = array.dtype.itemsize
        first, last = (max(-(-(byte - array.offset) // width), 0) for byte in (piece.begin, piece.end))
        if first >= last:
            yield None, piece.end - piece.begin
            return
        windows = _windows(unit, file, path, array, max(first - 1, 0), tokenizer.vocab_size)
        taken = piece.begin
        for ids, end in _between(unit, path, windows, first, last, borders):
            reached = min(max(array.offset + end * width, taken), piece.end)
            yield in_file(unit, tokenizer.decode(ids.tolist()), ids) if len(ids) else None, reached - taken
            taken = reached
        yield None, piece.end - taken


def _between(
    unit: Unit, path: Path, windows: Iterator[tuple[int, NDArray]], first: int, last: int, borders: set[int]
) -> Iterator[tuple[NDArray, int]]:
    """The tokens of each document that begins in [first, last), and the place after its border."""
    start = 0 if first == 0 else None  # the first token of the document that is read
    parts: list[NDArray] = []
    seen, end = False, 0
    for at, window in windows:
        begin, end = 0, at + len(window)
        for edge in np.flatnonzero(np.isin(window, list(borders))).tolist():
            seen = True
            if start is not None:
                yield np.concatenate([*parts, window[begin:edge]]), at + edge + 1
            start, begin, parts = at + edge + 1, edge + 1, []
            if start >= last:
                return
        if start is not None:
            parts.append(window[begin:])
            if end - start > _LONGEST:
                _no_border(unit, path, borders)
    if start == 0 and not seen:
        _no_border(unit, path, borders)
    if start is not None and parts:
        yield np.concatenate(parts), end


def _no_border(unit: Unit, path: Path, borders: set[int]) -> None:
    named = " or ".join(str(token) for token in sorted(borders))
    raise UserError(
        f"'{path}' has no end of a document (token {named}) where one should be; set "
        f"data.sources.{unit.source}.eos_token_id to the token that ends a document in it."
    )


def _windows(
    unit: Unit, file: IO[bytes], path: Path, array: _Array, at: int, vocab_size: int
) -> Iterator[tuple[int, NDArray]]:
    """From token `at` on, some at a time, each with its place."""
    while at < array.count:
        count = min(_WINDOW, array.count - at)
        file.seek(array.offset + at * array.dtype.itemsize)
        data = file.read(count * array.dtype.itemsize)
        if len(data) != count * array.dtype.itemsize:
            raise EOFError
        window = np.frombuffer(data, array.dtype)
        wrong = np.flatnonzero((window < 0) | (window >= vocab_size))
        if len(wrong):
            raise UserError(
                f"'{path}' has token {window[wrong[0]]} at place {at + wrong[0]}, outside the {vocab_size} tokens of "
                f"data.tokenizer; set data.tokenizer to the one that data.sources.{unit.source} was made with"
                f"{', or its dtype' if unit.format == 'bin' else ''}."
            )
        yield at, window
        at += count


def _npy(file: IO[bytes], path: Path) -> _Array:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    size = path.stat().st_size
    try:
        version = np.lib.format.read_magic(file)
    except ValueError as error:
        raise UserError(
            f"'{path}' has no .npy header; if it is bare tokens under that name, as OLMo-core writes them, set the "
            "source's format to bin, its dtype, and include to ['*.npy']."
        ) from error
    try:
        shape, _, dtype = readers[version](file)
    except (KeyError, ValueError, TypeError, SyntaxError, RecursionError) as error:
        raise UserError(f"'{path}' has an .npy header that is not readable; write it with numpy.save.") from error
    if len(shape) != 1 or dtype.kind not in "ui":
        raise UserError(
            f"'{path}' holds an array of {dtype} in {len(shape)} dimensions; save token ids as one row of uint16 or "
            "uint32."
        )
    offset = file.tell()
    if size != offset + shape[0] * dtype.itemsize:
        raise UserError(
            f"'{path}' has {size} bytes, but its header says {offset + shape[0] * dtype.itemsize}; fetch it again or "
            "exclude it."
        )
    return _Array(dtype, offset, shape[0])


def _bare(unit: Unit, file: IO[bytes], path: Path) -> _Array:
    size, dtype = path.stat().st_size, np.dtype(unit.dtype).newbyteorder("<")
    key = f"data.sources.{unit.source}"
    head = file.read(_LLM_C_BYTES)
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        raise UserError(f"'{path}' has an .npy header; set {key}.format to npy.")
    offset = 0
    if len(head) == _LLM_C_BYTES:
        magic, version, count = np.frombuffer(head, "<i4", 3).tolist()
        named = _LLM_C.get((magic, version))
        if named is not None:
            offset = _LLM_C_BYTES
            if size != offset + count * dtype.itemsize:  # so too if that is another dtype
                raise UserError(
                    f"'{path}' has llm.c's header of {count} tokens of {named}, which {size} bytes of {unit.dtype} do "
                    f"not hold; set {key}.dtype to {named}, or fetch it again."
                )
    if (size - offset) % dtype.itemsize:
        raise UserError(
            f"'{path}' has {size} bytes, which is no whole number of {unit.dtype}; set {key}.dtype, or fetch it again."
        )
    if unit.dtype == "uint16" and len(head) >= 64 and not offset and not np.frombuffer(head[2:64], "<u2")[::2].any():
        raise UserError(f"'{path}' looks like uint32, since every second uint16 is 0; set {key}.dtype to uint32.")
    return _Array(dtype, offset, (size - offset) // dtype.itemsize)
