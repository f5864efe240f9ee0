"""`megahybrid loss`: how well a model predicts given texts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from megahybrid.errors import UserError
from megahybrid.inference.command import add_dtype

_ROW = "{:<24} {:>12} {:>13} {:>12} {:>12}"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The flags."""
    verb.add_argument("path", type=Path, metavar="PATH", help="a run directory, a checkpoint, or an exported model")
    verb.add_argument("files", type=Path, nargs="+", metavar="FILE", help="UTF-8 text, a document each")
    verb.add_argument("--length", type=int, help="tokens of a piece that is read by itself (default: training's)")
    add_dtype(verb)
    verb.add_argument("--batch-size", type=int, help="pieces in work at once (default: up to 64, 2^20 tokens)")


def run(parsed: argparse.Namespace) -> None:
    """Print a line a file and one of all; on rank 0 only, all ranks compute. Raises UserError."""
    for name in ("length", "batch_size"):
        if (value := getattr(parsed, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    texts = [_text(file) for file in parsed.files]
    from megahybrid.evaluation import subject
    from megahybrid.evaluation.scorer import Scorer
    from megahybrid.parallel import groups

    found = subject.load(parsed.path, parsed.dtype)
    length = parsed.length or found.config.train.seq_length
    sums = [[0.0, 0] for _ in texts]
    for number, nats, tokens in Scorer(found.model, found.tokenizer, parsed.batch_size).losses(texts, length):
        if not tokens:
            raise UserError(f"The model's tokenizer finds no token in '{parsed.files[number]}'; leave it out.")
        sums[number][0] += nats
        sums[number][1] += tokens
    if groups.is_main():
        sizes = [len(text.encode()) for text in texts]
        for line in _table([*map(str, parsed.files)], sums, sizes):
            print(line)


def _text(file: Path) -> str:
    try:
        text = file.read_bytes().decode()  # its line ends as they are, as `prepare` reads
    except (OSError, UnicodeDecodeError) as error:
        what = "is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise UserError(f"'{file}' {what}; give files of text.") from error
    if not text:
        raise UserError(f"'{file}' is empty; leave it out.")
    return text


def _table(names: Sequence[str], sums: Sequence[Sequence[float]], sizes: Sequence[int]) -> list[str]:
    """sums: nats and tokens of each file; sizes: in bytes."""
    rows = [*zip(names, *zip(*sums, strict=True), sizes, strict=True)]
    if len(rows) > 1:
        rows.append(("all", *(sum(column) for column in [*zip(*sums, strict=True), sizes])))
    lines = [_ROW.format("file", "tokens", "nats a token", "perplexity", "bits a byte")]
    for name, nats, tokens, size in rows:
        mean, bits = nats / tokens, nats / math.log(2) / size
        lines.append(_ROW.format(name, f"{tokens:,}", f"{mean:.4f}", f"{math.exp(mean):.3f}", f"{bits:.4f}"))
    return lines
