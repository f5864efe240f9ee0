"""`megahybrid prepare`: text → tokenizer → MDS shards, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megahybrid.config.schema import Config
from megahybrid.data.documents import Document, Skipped, list_documents, read_documents, split_documents
from megahybrid.data.prepared import (
    TRAIN,
    VALIDATION,
    Prepared,
    SplitCounts,
    differences,
    find_prepared,
    prepare_settings,
)
from megahybrid.data.tokenizer import Tokenizer, tokenizer_file, tokenizer_hash
from megahybrid.data.writing import SampleWriter, token_dtype
from megahybrid.errors import UserError
from megahybrid.files import sync_folder

Report = Callable[[str], Any]

# More text than this makes tokenizer training longer, not better.
_TOKENIZER_BYTES = 20_000_000
# Text that is tokenised at once: enough for all cores, little enough for memory.
_BATCH_BYTES = 4_000_000
_SECONDS_BETWEEN_LINES = 10.0


def prepare(config: Config, report: Report = print) -> Prepared:
    """Tokenise the recipe's sources into data.path; does nothing if that was done before with the same settings.

    data.path appears in one rename when everything is written. Call it from one process.
    Raises UserError for sources without text, for a tokenizer that does not fit, and if data.path holds anything else.
    """
    settings = prepare_settings(config)
    target = Path(config.data.path).expanduser().absolute()
    if (prepared := _already(target, settings)) is not None:
        report(f"{target} is already prepared: {prepared.samples(TRAIN):,} samples to train on.")
        return prepared
    skipped = Skipped()
    sources = _split_sources(config, skipped)
    with _appearing(target) as part:
        tokenizer = _tokenizer(config, sources, part / "tokenizer" / "tokenizer.json", report)
        counts = _write(config, sources, tokenizer, part, skipped, report)
        prepared = Prepared(
            root=part,
            seq_length=config.train.seq_length,
            vocab_size=tokenizer.vocab_size,
            document_id=tokenizer.document_id,
            token_dtype=token_dtype(tokenizer.vocab_size),
            tokenizer_sha256=tokenizer_hash(part / "tokenizer" / "tokenizer.json"),
            settings=settings,
            sources=counts,
        )
        _summary(prepared, skipped, report)
        prepared.save()
    prepared.root = target
    report(f"Prepared {target}.")
    return prepared


@dataclass
class _Source:
    """The documents of one source."""

    train: list[Document]
    validation: list[Document]

    def splits(self) -> Iterator[tuple[str, list[Document]]]:
        yield TRAIN, self.train
        yield VALIDATION, self.validation


def _already(target: Path, settings: dict[str, Any]) -> Prepared | None:
    prepared = find_prepared(target)
    if prepared is None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"data.path '{target}' exists and was not made by prepare; remove it or choose another.")
        return None
    if changed := differences(prepared, settings):
        was = ", ".join(f"{key} ({prepared.settings.get(key)}, now {settings.get(key)})" for key in changed)
        raise UserError(f"data.path '{target}' was prepared with another {was}; remove it or choose another data.path.")
    return prepared


def _split_sources(config: Config, skipped: Skipped) -> dict[str, _Source]:
    if not config.data.sources:
        raise UserError("data.sources is empty; name at least one folder of text, such as data.sources.books.path=DIR.")
    sources = {}
    for name, source in sorted(config.data.sources.items()):
        if not re.fullmatch(r"\w[\w.-]*", name) or name in ("tokenizer", "dataset.json"):
            raise UserError(f"data.sources.{name} needs another name, one that can name a folder beside tokenizer/.")
        documents = list_documents(name, source, skipped)
        sources[name] = _Source(*split_documents(documents, config.data.validation_fraction))
    return sources


def _tokenizer(config: Config, sources: dict[str, _Source], file: Path, report: Report) -> Tokenizer:
    if config.data.tokenizer is not None:
        given = tokenizer_file(config.data.tokenizer)
        tokenizer = Tokenizer.load(given)
        tokenizer.require_fit(config.model.vocab_size)
        file.parent.mkdir()
        shutil.copyfile(given, file)
        return tokenizer
    start, size = time.perf_counter(), 0

    def texts() -> Iterator[str]:
        nonlocal size
        for document, text in read_documents(_sample(sources), Skipped()):
            size += document.bytes
            yield text

    tokenizer = Tokenizer.train(texts(), config.model.vocab_size)
    tokenizer.require_fit(config.model.vocab_size)
    tokenizer.save(file)
    seconds = time.perf_counter() - start
    report(f"Trained a tokenizer of {tokenizer.vocab_size:,} tokens on {size / 1e6:.1f} MB in {seconds:.1f} s.")
    return tokenizer


def _sample(sources: dict[str, _Source]) -> Iterator[Document]:
    """Of every source, training documents in proportion to its size, `_TOKENIZER_BYTES` over all."""
    total = sum(document.bytes for source in sources.values() for document in source.train)
    part = min(1.0, _TOKENIZER_BYTES / total)
    for source in sources.values():
        room = part * sum(document.bytes for document in source.train)
        for document in source.train:
            if room <= 0:
                break
            room -= document.bytes
            yield document


def _write(
    config: Config, sources: dict[str, _Source], tokenizer: Tokenizer, part: Path, skipped: Skipped, report: Report
) -> dict[str, dict[str, SplitCounts]]:
    total = sum(document.bytes for source in sources.values() for _, side in source.splits() for document in side)
    counts: dict[str, dict[str, SplitCounts]] = {}
    with _progress(total, report) as advance:
        for name, source in sources.items():
            counts[name] = {}
            for split, documents in source.splits():
                folder = part / name / split
                counts[name][split] = _write_split(config, documents, tokenizer, folder, skipped, advance)
    return counts


def _write_split(
    config: Config,
    documents: list[Document],
    tokenizer: Tokenizer,
    folder: Path,
    skipped: Skipped,
    advance: Callable[[int], None],
) -> SplitCounts:
    counts = SplitCounts()
    with SampleWriter(folder, config.train.seq_length, token_dtype(tokenizer.vocab_size)) as writer:
        for batch in _batches(documents, skipped):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            writer.add([[tokenizer.document_id, *ids] for ids in encoded])
            size = sum(document.bytes for document, _ in batch)
            counts.documents += len(batch)
            counts.bytes += size
            counts.tokens += sum(map(len, encoded)) + len(encoded)
            advance(size)
    counts.samples = writer.samples
    return counts


def _batches(documents: list[Document], skipped: Skipped) -> Iterator[list[tuple[Document, str]]]:
    batch: list[tuple[Document, str]] = []
    size = 0
    for document, text in read_documents(documents, skipped):
        batch.append((document, text))
        size += document.bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _summary(prepared: Prepared, skipped: Skipped, report: Report) -> None:
    for name, splits in prepared.sources.items():
        for split, counts in splits.items():
            report(
                f"{name}/{split}: {counts.samples:,} samples of {prepared.seq_length:,} tokens, "
                f"from {counts.tokens:,} tokens in {counts.documents:,} documents ({counts.bytes / 1e6:.1f} MB)."
            )
    if skipped.not_utf8 or skipped.empty:
        report(f"Passed over {skipped.empty:,} empty files and {skipped.not_utf8:,} that are not UTF-8.")
    if not prepared.samples(TRAIN):
        tokens = sum(splits[TRAIN].tokens for splits in prepared.sources.values())
        raise UserError(
            f"The sources hold {tokens:,} tokens to train on, less than one sample (train.seq_length + 1 = "
            f"{prepared.seq_length + 1:,}); add text or lower train.seq_length."
        )
    if prepared.settings["data.validation_fraction"] and not prepared.samples(VALIDATION):
        report("The validation documents are shorter than one sample: nothing to validate on.")


@contextlib.contextmanager
def _progress(total: int, report: Report) -> Iterator[Callable[[int], None]]:
    """`advance(bytes)`: a bar on a terminal, now and then a line elsewhere, the speed at the end."""
    console, start = Console(), time.perf_counter()
    done, last_line = 0, start
    columns = TextColumn("Tokenising"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def advance(size: int) -> None:
            nonlocal done, last_line
            done += size
            bar.advance(task, size)
            now = time.perf_counter()
            if not console.is_terminal and now - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = now
                report(f"Tokenised {done / 1e6:.1f} of {total / 1e6:.1f} MB ({done / 1e6 / (now - start):.1f} MB/s).")

        yield advance
    seconds = time.perf_counter() - start
    report(f"Tokenised and wrote {done / 1e6:.1f} MB in {seconds:.1f} s ({done / 1e6 / seconds:.1f} MB/s).")


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A hidden sibling folder to fill, which becomes `target` if the block succeeds and disappears if not."""
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target):
            try:
                shutil.rmtree(part, ignore_errors=True)  # of a killed run
                part.mkdir()
                yield part
                _sync(part)
                os.replace(part, target)
                sync_folder(target.parent)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"data.path '{target}' cannot be written: {error.strerror or error}; choose another data.path."
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


def _sync(folder: Path) -> None:
    """Make all files durable before the rename that declares them whole."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
