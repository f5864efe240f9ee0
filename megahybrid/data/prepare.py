"""`megahybrid prepare`: text → tokenizer → tokens → MDS shards, whole or not at all, going on where it was stopped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.config.schema import Config
from megahybrid.config.task_sources import task_sources, text_sources
from megahybrid.data import writing
from megahybrid.data.assembly import assemble
from megahybrid.data.blocks import blocks_of
from megahybrid.data.documents import TRAIN, VALIDATION, Skipped, Unit
from megahybrid.data.mds import token_dtype
from megahybrid.data.planning import fingerprint, plan
from megahybrid.data.prepared import (
    Prepared,
    SplitCounts,
    data_identity,
    differences,
    find_prepared,
    prepare_settings,
    told,
)
from megahybrid.data.progress import progress
from megahybrid.data.reading import read_unit
from megahybrid.data.tokenizer import Tokenizer, tokenizer_file, tokenizer_hash
from megahybrid.data.units import Format, UnitCounts, finished, finished_unit
from megahybrid.data.workers import Job, write_all
from megahybrid.errors import MachineFault, UserError
from megahybrid.files import sync_folder, write_json

Report = Callable[[str], Any]

# More text than this makes tokenizer training longer, not better.
_TOKENIZER_BYTES = 20_000_000
# Less text than this is tokenised before more processes have started.
_LITTLE_BYTES = 8_000_000
# Of everything that a finished unit depends on and its plan does not show.
_VERSION = 2


def prepare(config: Config, report: Report = print) -> Prepared:
    """Tokenise the recipe's sources into data.path; does nothing if that was done before with the same settings.

    data.path appears in one rename when everything is written. Until then the finished parts wait in a hidden folder
    beside it; the next prepare with the same settings and files goes on from there, to the same result byte for byte.
    What is written does not depend on data.workers. Call it from one process.
    Raises UserError for sources without text, for a tokenizer that does not fit, and if data.path holds anything else.
    """
    if task_sources(config) and not text_sources(config):
        raise UserError("All sources of the recipe are tasks, made while training: there is nothing to prepare.")
    settings = prepare_settings(config)
    target = Path(str(config.data.path)).expanduser().absolute()
    if (prepared := _already(target, settings)) is not None:
        report(
            f"{target} is already prepared: {prepared.samples(TRAIN):,} samples to train on, "
            f'data.identity "{data_identity(config, prepared)}".'
        )
        return prepared
    skipped = Skipped()
    units = plan(config, skipped)
    with _workplace(target) as place:
        _begin(place, {"version": _VERSION, "settings": settings, "files": fingerprint(units)}, report)
        tokenizer = _tokenizer(config, units, place / "tokenizer" / "tokenizer.json", report)
        made = Format(
            tokenizer=str(place / "tokenizer" / "tokenizer.json"),
            seq_length=config.train.seq_length,
            dtype=token_dtype(tokenizer.vocab_size),
            shard_bytes=writing.SHARD_BYTES,
        )
        counts = _tokenise(config, units, made, place, report)
        for each in (each for source in counts.values() for each in source):
            skipped.add(each.skipped)
        _report_skipped(skipped, report)
        _require_text(config, units, counts)
        blocks = _cut(config, counts, tokenizer.document_id, made, place, report)
        splits = _assemble(blocks, counts, tokenizer.document_id, made, place)
        prepared = Prepared(
            root=place / "final",
            seq_length=config.train.seq_length,
            vocab_size=tokenizer.vocab_size,
            document_id=tokenizer.document_id,
            token_dtype=token_dtype(tokenizer.vocab_size),
            tokenizer_sha256=tokenizer_hash(place / "tokenizer" / "tokenizer.json"),
            settings=settings,
            sources=splits,
        )
        _summary(prepared, report)
        prepared.save()
        _appear(place / "final", target)
    prepared.root = target
    report(f'Prepared {target}, data.identity "{data_identity(config, prepared)}".')
    return prepared


def _already(target: Path, settings: dict[str, Any]) -> Prepared | None:
    prepared = find_prepared(target)
    if prepared is None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"data.path '{target}' exists and was not made by prepare; remove it or choose another.")
        return None
    if changed := differences(prepared, settings):
        if "data.tokenizer" in changed and "model.vocab_size" in changed:  # counts only where prepare trains one
            changed.remove("model.vocab_size")
        was = told(changed, prepared.settings, settings)
        raise UserError(f"data.path '{target}' was prepared with another {was}; remove it or choose another data.path.")
    return prepared


def _begin(place: Path, facts: dict[str, Any], report: Report) -> None:
    """Keep what an earlier prepare has finished if it was the same; sweep everything else."""
    file = place / "plan.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(file.read_text(encoding="utf-8")) == facts:
            shutil.rmtree(place / "final", ignore_errors=True)
            report(f"Going on from the finished parts in {place}.")
            return
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(file, facts)


def _tokenizer(config: Config, units: dict[str, list[Unit]], file: Path, report: Report) -> Tokenizer:
    if config.data.tokenizer is not None:
        given = tokenizer_file(config.data.tokenizer)
        tokenizer = Tokenizer.load(given)
        tokenizer.require_fit(config.model.vocab_size)
        file.parent.mkdir(exist_ok=True)
        shutil.copyfile(given, file)
        return tokenizer
    if not file.exists():  # it appears whole
        size = 0

        def texts() -> Iterator[str]:
            nonlocal size
            for text in _sample(units):
                size += len(text)
                yield text

        tokenizer = Tokenizer.train(texts(), config.model.vocab_size)
        tokenizer.save(file)
        report(f"Trained a tokenizer of {tokenizer.vocab_size:,} tokens on {size / 1e6:.1f} M characters.")
    tokenizer = Tokenizer.load(file)
    tokenizer.require_fit(config.model.vocab_size)
    return tokenizer


def _sample(units: dict[str, list[Unit]]) -> Iterator[str]:
    """Of every source, training documents in proportion to its size, `_TOKENIZER_BYTES` over all."""
    total = sum(unit.bytes for each in units.values() for unit in each)
    part = min(1.0, _TOKENIZER_BYTES / total)
    for each in units.values():
        room = part * sum(unit.bytes for unit in each)
        for text, size in _training_texts(each):
            if part < 1 and room <= 0:
                break
            room -= size
            yield text


def _training_texts(units: list[Unit]) -> Iterator[tuple[str, int]]:
    for unit in units:
        for texts, _ in read_unit(unit, Skipped()):
            yield from ((text.text, text.bytes) for text in texts if text.split == TRAIN)


def _tokenise(
    config: Config, units: dict[str, list[Unit]], made: Format, place: Path, report: Report
) -> dict[str, list[UnitCounts]]:
    """Write all units that are not finished; what each has come to."""
    everything = [(unit, _unit_folder(place, unit.source, unit.number)) for each in units.values() for unit in each]
    _write(config, everything, "Tokenised", made, report)
    counts: dict[str, list[UnitCounts]] = {name: [] for name in units}
    for unit, folder in everything:
        found = finished_unit(folder)
        if found is None:
            raise OSError(f"'{folder}' is not what was written a moment ago")
        counts[unit.source].append(found)
    return counts


def _cut(
    config: Config, counts: dict[str, list[UnitCounts]], document_id: int, made: Format, place: Path, report: Report
) -> dict[str, list[Path]]:
    """Write all blocks that are not finished; the folders of every source's."""
    folders: dict[str, list[Path]] = {}
    everything: list[tuple[Job, Path]] = []
    for name, each in counts.items():
        files = [
            (_unit_folder(place, name, number) / "train.bin", count.tokens[TRAIN]) for number, count in enumerate(each)
        ]
        shuffle = config.data.sources[name].format != "text"
        blocks = list(blocks_of(name, shuffle, document_id, files, np.dtype(made.dtype).itemsize))
        folders[name] = [place / "blocks" / name / f"{block.number:06}" for block in blocks]
        everything += zip(blocks, folders[name], strict=True)
    _write(config, everything, "Cut", made, report)
    return folders


def _write(config: Config, jobs: Sequence[tuple[Job, Path]], what: str, made: Format, report: Report) -> None:
    """Do the jobs whose folders are not finished."""
    missing = [(job, folder) for job, folder in jobs if finished(folder) is None]
    if len(missing) < len(jobs):
        report(f"{what} before: {len(jobs) - len(missing):,} of {len(jobs):,} parts.")
    total = sum(job.bytes for job, _ in missing)
    workers = config.data.workers or (1 if total < _LITTLE_BYTES else len(os.sched_getaffinity(0)))
    with progress(total, what, report) as advance:
        write_all(missing, made, workers, advance)


def _assemble(
    blocks: dict[str, list[Path]], counts: dict[str, list[UnitCounts]], document_id: int, made: Format, place: Path
) -> dict[str, dict[str, SplitCounts]]:
    final = place / "final"
    final.mkdir()
    (final / "tokenizer").mkdir()
    shutil.copyfile(made.tokenizer, final / "tokenizer" / "tokenizer.json")
    splits: dict[str, dict[str, SplitCounts]] = {}
    for name, each in counts.items():
        units = [_unit_folder(place, name, number) for number in range(len(each))]
        samples = assemble(blocks[name], units, final / name, made.seq_length, made.dtype, document_id)
        splits[name] = {
            split: SplitCounts(
                documents=sum(count.documents[split] for count in each),
                bytes=sum(count.bytes[split] for count in each),
                tokens=sum(count.tokens[split] for count in each),
                samples=samples[split],
                index_sha256=hashlib.sha256((final / name / split / "index.json").read_bytes()).hexdigest(),
            )
            for split in (TRAIN, VALIDATION)
        }
    return splits


def _unit_folder(place: Path, source: str, number: int) -> Path:
    return place / "units" / source / f"{number:06}"


def _report_skipped(skipped: Skipped, report: Report) -> None:
    named = {
        "of names that include leaves out": skipped.other_names,
        "empty": skipped.empty,
        "not UTF-8": skipped.not_utf8,
        "not JSON objects": skipped.not_json,
        "without the field": skipped.no_text,
    }
    if any(named.values()):
        found = ", ".join(f"{count:,} {kind}" for kind, count in named.items() if count)
        report(
            f"Passed over files, lines or rows: {found}{f' (the first: {skipped.example})' if skipped.example else ''}."
        )


def _require_text(config: Config, units: dict[str, list[Unit]], counts: dict[str, list[UnitCounts]]) -> None:
    """Refuse a source without a document."""
    for name, each in counts.items():
        if any(sum(count.documents.values()) for count in each):
            continue
        skipped = Skipped()
        for count in each:
            skipped.add(count.skipped)
        source = config.data.sources[name]
        if source.format in ("jsonl", "parquet") and skipped.bad:
            what = "row" if source.format == "parquet" else "line"
            objects = f"{skipped.not_json:,} are not JSON objects, " if what == "line" else ""
            raise UserError(
                f"data.sources.{name} has no {what} with a text under '{source.field}' ({objects}{skipped.no_text:,} "
                f"lack it, {skipped.not_utf8:,} are not UTF-8; the first: {skipped.example}); set "
                f"data.sources.{name}.field, or its path."
            )
        raise UserError(
            f"data.sources.{name} holds no text in its {sum(len(unit.pieces) for unit in units[name]):,} files "
            f"({skipped.not_utf8:,} are not UTF-8); change its path, include or exclude."
        )


def _summary(prepared: Prepared, report: Report) -> None:
    for name, splits in prepared.sources.items():
        for split, counts in splits.items():
            report(
                f"{name}/{split}: {counts.samples:,} samples of {prepared.seq_length:,} tokens, "
                f"from {counts.tokens:,} tokens in {counts.documents:,} documents ({counts.bytes / 1e6:.1f} MB)."
            )
    if not prepared.samples(TRAIN):
        tokens = sum(splits[TRAIN].tokens for splits in prepared.sources.values())
        raise UserError(
            f"The sources hold {tokens:,} tokens to train on, less than one sample (train.seq_length + 1 = "
            f"{prepared.seq_length + 1:,}); add text or lower train.seq_length."
        )
    if prepared.settings["data.validation_fraction"]:
        _report_unvalidated(prepared, report)


def _report_unvalidated(prepared: Prepared, report: Report) -> None:
    """Say of which sources no sample is held out, and why not, those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for name, splits in prepared.sources.items():
        if not splits[VALIDATION].samples:
            reasons.setdefault(_why_unvalidated(splits), []).append(name)
    for why, names in reasons.items():
        report(f"Validation will be without {', '.join(names)}, since {why}.")


def _why_unvalidated(splits: dict[str, SplitCounts]) -> str:
    held = splits[VALIDATION].documents
    if not held and splits[TRAIN].documents == 1:
        return "a single document is trained on; cut it into several to hold some out"
    why = "what is held out is less than one sample" if held else "no document was drawn"
    return f"{why}; raise data.validation_fraction to hold out more"


@contextlib.contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A hidden sibling folder. It stays if the block is stopped or a disk fails, so that the next prepare can go on,
    and disappears if the block succeeds or the recipe is at fault."""
    place = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target):
            place.mkdir(exist_ok=True)
            try:
                yield place
            except UserError as error:
                if not isinstance(error, MachineFault):
                    shutil.rmtree(place, ignore_errors=True)
                raise
            shutil.rmtree(place, ignore_errors=True)
    except BrokenPipeError:  # of who reads what is said
        raise
    except OSError as error:
        raise UserError(
            f"data.path '{target}' cannot be written: {error.strerror or error}; make room or choose another data.path."
        ) from error


@contextlib.contextmanager
def _only_one(target: Path) -> Iterator[None]:
    lock = target.with_name(f".{target.name}.lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another prepare is writing '{target}'; wait for it, or choose another data.path."
            ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _appear(final: Path, target: Path) -> None:
    """Make all files durable, then let them appear in one rename: data.path is whole or absent."""
    for path in final.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    os.replace(final, target)
    sync_folder(target.parent)
