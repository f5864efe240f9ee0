"""Texts in files of every format, and what is read from them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megahybrid.config.schema import Config, SourceConfig
from megahybrid.config.validate import validate
from megahybrid.data import Tokenizer
from megahybrid.data.documents import Piece, Skipped, Unit
from megahybrid.data.reading import read_unit
from tests.data.corpora import make_config

WORDS = ("state", "memory", "window", "token", "gate", "key", "rule", "é", "你好", "🙂", "<|endoftext|>")


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Of 1 to 120 words, some of them twice."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.choice([1, 3, 20, 120]))) + rng.choice(["", "\n"]) for _ in range(count)]
    return texts + texts[: count // 10]


def write_jsonl(file: Path, texts: list[str]) -> None:
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in [*texts, ""])
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_parquet(file: Path, texts: list[str], row_group_size: int = 7, **options) -> None:
    columns = {"id": list(range(len(texts) + 2)), "text": [*texts, None, ""], "score": [0.5] * (len(texts) + 2)}
    pq.write_table(pa.table(columns), file, row_group_size=row_group_size, **options)


def ids_of(tokenizer: Tokenizer, texts: list[str], before: bool = False) -> list[int]:
    """The documents' tokens with the document token after each, or before."""
    eos = tokenizer.document_id
    parts = [[eos, *ids] if before else [*ids, eos] for ids in tokenizer.encode_batch(texts)]
    return [token for part in parts for token in part]


def recipe(root: Path, tokenizer: Path | None, **sources: SourceConfig) -> Config:
    config = make_config(root, sources, tokenizer=None if tokenizer is None else str(tokenizer))
    validate(config)
    return config


def read(root: Path, kind: str, *pieces: Piece, tokenizer: Tokenizer | None = None, **values):
    """Texts or tokens of a unit of these pieces, and what was passed over."""
    skipped = Skipped()
    unit = Unit("s", 0, str(root), kind, values.pop("field", "text"), 0.1, **values, pieces=list(pieces))
    found = [each for documents, _ in read_unit(unit, skipped, tokenizer) for each in documents]
    assert sum(taken for _, taken in read_unit(unit, Skipped(), tokenizer)) == unit.bytes
    return [each.text if each.tokens is None else each.tokens.tolist() for each in found], skipped
