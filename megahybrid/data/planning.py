"""The units of work of `prepare`: the same for any number of workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from megahybrid.config.schema import FILE_NAMES, Config, SourceConfig
from megahybrid.config.task_sources import text_sources
from megahybrid.data.documents import (
    TRAIN,
    VALIDATION,
    Piece,
    Skipped,
    Unit,
    draw,
    list_files,
    matched,
    split_names,
)
from megahybrid.data.lines import is_compressed
from megahybrid.data.parquet import pyarrow
from megahybrid.data.prepared import include_patterns, is_source_name
from megahybrid.errors import UserError

# A unit is lost when `prepare` is killed: about a minute of a core.
_LARGEST_UNIT = 1 << 28
_SMALLEST_UNIT = 1 << 20
_UNITS = 64


def plan(config: Config, skipped: Skipped) -> dict[str, list[Unit]]:
    """Source → its units, in an order that depends on names and sizes only.

    Raises UserError for sources without text or with an unfit name, and for parquet without pyarrow.
    """
    if not config.data.sources:
        raise UserError(
            "data.sources is empty; name at least one folder or file of text, such as data.sources.books.path=DIR."
        )
    units = {}
    for name, source in text_sources(config).items():
        if not is_source_name(name):
            raise UserError(f"data.sources.{name} needs another name, one that can name a folder beside tokenizer/.")
        if source.format == "parquet":
            pyarrow(name)
        root, files = _listed(name, source, skipped)
        size = min(max(sum(files.values()) // _UNITS, _SMALLEST_UNIT), _LARGEST_UNIT)
        if source.format == "text":
            pieces = _files(name, files, config.data.validation_fraction)
        else:
            pieces = _parts(name, files, size)
        facts = str(root.absolute()), source.format, source.field, config.data.validation_fraction
        ids = source.dtype, source.eos_token_id
        units[name] = [Unit(name, number, *facts, *ids, group) for number, group in enumerate(_grouped(pieces, size))]
    return units


def fingerprint(units: dict[str, list[Unit]]) -> str:
    """Hash of all that the units read, with the time of the files' last change."""
    digest = hashlib.sha256()
    for unit in (unit for each in units.values() for unit in each):
        changed = [Path(unit.root, piece.name).stat().st_mtime_ns for piece in unit.pieces]
        digest.update(json.dumps([unit.to_json(), changed], sort_keys=True).encode())
    return digest.hexdigest()


def _listed(name: str, source: SourceConfig, skipped: Skipped) -> tuple[Path, dict[str, int]]:
    """A folder and its files, or a single file as if its folder held nothing else."""
    path = Path(str(source.path)).expanduser()
    if not path.is_file():
        return path, list_files(name, path, include_patterns(source), source.exclude, skipped)
    _require_meant(f"data.sources.{name}", source, path)
    size = path.stat().st_size
    if not size:
        raise UserError(f"data.sources.{name}.path '{path}' is an empty file; give one that holds documents.")
    return path.parent, {path.name: size}


def _require_meant(key: str, source: SourceConfig, file: Path) -> None:
    """Refuse a single file that the source's own include leaves out, and without one a file of another format's name
    as text, which it may well be: one document."""
    if source.include and matched(file.name, source.include) is None:
        raise UserError(
            f"{key}.path '{file}' is a file that {key}.include [{', '.join(source.include)}] leaves out; change one of "
            "them."
        )
    if source.include or source.format != "text":
        return
    for other, patterns in FILE_NAMES.items():
        if other != "text" and (pattern := matched(file.name, patterns)):
            raise UserError(
                f"{key}.path '{file}' has a name of format {other}, but {key}.format is text; set it to {other}, or "
                f"include to ['{pattern}'] if the whole file is one document."
            )


def _files(source: str, files: dict[str, int], fraction: float) -> list[Piece]:
    """A document each, in an order that depends on their names only."""
    names = sorted(files, key=lambda name: (draw("order", source, name), name))
    held = split_names(source, names, fraction)
    return [Piece(name, 0, files[name], VALIDATION if name in held else TRAIN) for name in names]


def _parts(source: str, files: dict[str, int], size: int) -> list[Piece]:
    """Parts of at most `size` bytes, except of compressed files: the files in an order that depends on their names
    only, without what says the format, so that it is the same in all of them; the parts of a file in theirs."""
    pieces = []
    for name in sorted(files, key=lambda name: (draw("order", source, _without_suffix(name)), name)):
        total = files[name]
        step = total if is_compressed(name) else size
        pieces += [Piece(name, begin, min(begin + step, total)) for begin in range(0, total, step)]
    return pieces


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return str((path.with_suffix("") if is_compressed(name) else path).with_suffix(""))


def _grouped(pieces: list[Piece], size: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    total = 0
    for piece in pieces:
        group.append(piece)
        total += piece.end - piece.begin
        if total >= size:
            yield group
            group, total = [], 0
    if group:
        yield group
