"""The same documents are the same shards, whichever format they come in."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megahybrid.config.schema import SourceConfig
from megahybrid.data import Tokenizer, blocks
from megahybrid.data.documents import Piece, Skipped
from megahybrid.data.planning import plan
from megahybrid.data.prepare import prepare
from megahybrid.data.prepared import prepare_settings
from megahybrid.errors import UserError
from tests.data.corpora import silent
from tests.data.formats import ids_of, read, recipe, some_texts, write_jsonl, write_parquet
from tests.data.test_prepare import assert_same_files


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Small texts make many units, windows, blocks and shards."""
    for name, size in {
        "planning._SMALLEST_UNIT": 1500,
        "tokens._WINDOW": 100,
        "blocks.BLOCK_TOKENS": 3000,
        "blocks._TOKENS_AT_ONCE": 64,
        "writing.SHARD_BYTES": 2000,
        "reading.CHUNK_BYTES": 1000,
    }.items():
        monkeypatch.setattr(f"megahybrid.data.{name}", size)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # of hundreds of files


FORMATS: dict[str, tuple[str, dict]] = {
    "jsonl": ("jsonl", {"format": "jsonl"}),
    "jsonl.gz": ("jsonl.gz", {"format": "jsonl"}),
    "parquet": ("parquet", {"format": "parquet"}),
    "parquet, one row group": ("parquet", {"format": "parquet"}),
    "npy16": ("npy", {"format": "npy"}),
    "npy32": ("npy", {"format": "npy"}),
    "bin16": ("bin", {"format": "bin", "dtype": "uint16"}),
    "bin32": ("bin", {"format": "bin", "dtype": "uint32"}),
    "llm.c": ("bin", {"format": "bin", "dtype": "uint16"}),
    "other eos": ("bin", {"format": "bin", "dtype": "uint16", "eos_token_id": 299}),
}


def write(name: str, file: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, texts, before=name == "llm.c")
    if name.startswith("jsonl"):
        write_jsonl(file, texts)
    elif name.startswith("parquet"):
        write_parquet(file, texts, row_group_size=10_000 if name.endswith("group") else 7)
    elif name.startswith("npy"):
        np.save(file, np.array(ids, f"uint{name[3:]}"))
    elif name == "llm.c":
        head = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253)
        file.write_bytes(head + np.array(ids, "<u2").tobytes())
    elif name == "other eos":  # with begin and end, as Llama 3's tokenizer has them
        parts = [[tokenizer.document_id, *each, 299] for each in tokenizer.encode_batch(texts)]
        file.write_bytes(np.array([token for part in parts for token in part], "<u2").tobytes())
    else:
        file.write_bytes(np.array(ids, f"<u{int(name[3:]) // 8}").tobytes())


def write_all_formats(root: Path, tokenizer: Tokenizer, *counts: int) -> None:
    for i, count in enumerate(counts):  # files whose names have dots: suffixes alone are left out of the order
        for name, (suffix, _) in FORMATS.items():
            folder = root / name
            folder.mkdir(exist_ok=True)
            write(name, folder / f"{i}.part.{suffix}", some_texts(count, seed=i), tokenizer)


def test_every_format_gives_the_same_shards(tmp_path, tokenizer, small_parts):
    file, known = tokenizer
    assert known.vocab_size == 300 and known.document_id != 299
    write_all_formats(tmp_path, known, 90, 4, 160)
    prepared = {}
    for name, (_, values) in FORMATS.items():
        config = recipe(tmp_path, file, s=SourceConfig(str(tmp_path / name), **values))
        config.data.path = str(tmp_path / f"{name}-data")
        units = plan(config, Skipped())["s"]
        assert len(units) >= {"jsonl": 30, "parquet": 10, "bin16": 10, "npy32": 20}.get(name, 1)
        prepared[name] = prepare(config, silent)
        assert_same_files(prepared[name].root / "s", prepared["jsonl"].root / "s")
        assert prepared[name].sources == prepared["jsonl"].sources
        assert prepared[name].identity == prepared["jsonl"].identity
    counts = prepared["jsonl"].sources["s"]
    assert counts["train"].documents + counts["validation"].documents == 99 + 4 + 176
    assert counts["validation"].documents > 10 and counts["train"].tokens > 3 * 3000
    index = json.loads((prepared["jsonl"].root / "s" / "train" / "index.json").read_text())
    assert len(index["shards"]) > 5


def test_every_number_of_workers_gives_the_same_shards(tmp_path, tokenizer, small_parts, monkeypatch):
    file, known = tokenizer
    write_all_formats(tmp_path, known, 80, 30)
    monkeypatch.setattr("megahybrid.data.planning._SMALLEST_UNIT", 5000)
    sources = {
        name.replace(".", ""): SourceConfig(str(tmp_path / name), **FORMATS[name][1])
        for name in ("jsonl.gz", "parquet", "npy32", "bin16")
    }
    config = recipe(tmp_path, file, **sources)
    assert all(len(units) > 1 for units in plan(config, Skipped()).values() if units[0].source != "jsonlgz")
    prepare(config, silent)
    two = replace(config, data=replace(config.data, path=str(tmp_path / "two"), workers=2))
    prepare(two, silent)
    assert_same_files(tmp_path / "data", tmp_path / "two")


def test_a_tokenizer_is_trained_on_parquet(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "a" / "x.jsonl", some_texts(300))
    write_parquet(tmp_path / "b" / "x.parquet", some_texts(300), compression="zstd", use_dictionary=False)
    sources = [SourceConfig(str(tmp_path / "a"), "jsonl"), SourceConfig(str(tmp_path / "b"), "parquet")]
    identities = []
    for i, source in enumerate(sources):
        config = recipe(tmp_path, None, s=source)
        config.data.path = str(tmp_path / f"data{i}")
        identities.append(prepare(config, silent).identity)
    assert identities[0] == identities[1]


@pytest.mark.parametrize("size", [1, 7, 300, 10**6])
@pytest.mark.parametrize(("kind", "begin"), [("npy", []), ("bin", []), ("npy", [0, 0])])
def test_every_tokenised_document_belongs_to_one_piece(tmp_path, tokenizer, monkeypatch, kind, begin, size):
    """Nothing between borders, borders at both ends, a last document without one, whatever the cut."""
    monkeypatch.setattr("megahybrid.data.tokens._WINDOW", 5)
    eos = tokenizer[1].document_id
    documents = [[5], [6, 7, 8] * 9, [9, 10], [11] * 40, [12, 13]]
    assert eos == 0
    ids = [*begin, *documents[0], eos, *documents[1], eos, eos, eos, *documents[2], eos, *documents[3], eos]
    ids += documents[4]
    file = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(file, np.array(ids, np.uint16))
    else:
        file.write_bytes(np.array(ids, np.uint32).tobytes())
    total = file.stat().st_size
    found = []
    for begin in range(0, total, size):
        piece = Piece(file.name, begin, min(begin + size, total))
        found += read(tmp_path, kind, piece, tokenizer=tokenizer[1], dtype="uint32" if kind == "bin" else None)[0]
    assert found == documents


@pytest.mark.parametrize("pieces", [200, 14, 1])
def test_every_row_group_belongs_to_one_piece(tmp_path, pieces):
    """Of 14 pieces for 14 row groups some begin where a row group does."""
    texts = some_texts(60)
    write_parquet(tmp_path / "x.parquet", texts, row_group_size=5)
    total = (tmp_path / "x.parquet").stat().st_size
    found, empty, missing = [], 0, 0
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 14
    for begin in range(0, total, total // pieces):
        piece = Piece("x.parquet", begin, min(begin + total // pieces, total))
        some, skipped = read(tmp_path, "parquet", piece)
        found, empty, missing = found + some, empty + skipped.empty, missing + skipped.no_text
    assert found == texts and (empty, missing) == (1, 1)


def test_columns_of_text_of_every_type(tmp_path, monkeypatch):
    """Also in more rows than are decoded at once; a text that is not UTF-8 is passed over and named."""
    monkeypatch.setattr("megahybrid.data.parquet._ROWS", 3)
    texts = some_texts(10)
    strings = pa.array(texts)
    columns = {
        "large": strings.cast(pa.large_string()),
        "view": strings.cast(pa.string_view()),
        "dictionary": strings.dictionary_encode(),
    }
    bad = pa.array([b"good", b"caf\xe9", *[b"x"] * (len(texts) - 2)])
    columns["bad"] = pa.StringArray.from_buffers(len(bad), bad.buffers()[1], bad.buffers()[2])
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    piece = Piece("x.parquet", 0, (tmp_path / "x.parquet").stat().st_size)
    for name in ("large", "view", "dictionary"):
        assert read(tmp_path, "parquet", piece, field=name)[0] == texts
    found, skipped = read(tmp_path, "parquet", piece, field="bad")
    assert found == ["good", *["x"] * (len(texts) - 2)]
    assert skipped.not_utf8 == 1 and skipped.example == f"'{tmp_path}/x.parquet', row group 0, row 1"


def test_other_settings_of_tokens_are_another_preparation(tmp_path, tokenizer):
    file, known = tokenizer
    (tmp_path / "text").mkdir()
    np.save(tmp_path / "text" / "x.npy", np.array(ids_of(known, some_texts(60)), np.uint32))
    source = SourceConfig(str(tmp_path / "text"), "npy")
    prepare(recipe(tmp_path, file, s=source), silent)
    other = recipe(tmp_path, file, s=replace(source, eos_token_id=5))
    with pytest.raises(UserError, match=r"another data\.sources\.s\.eos_token_id \(not set, now 5\)"):
        prepare(other, silent)
    for values, more in (
        ({"format": "parquet"}, {"field": "content"}),
        ({"format": "bin", "dtype": "uint16"}, {"dtype": "uint32"}),
        ({"format": "bin", "dtype": "uint16"}, {"eos_token_id": 1}),
    ):
        one, two = (
            prepare_settings(recipe(tmp_path, file, s=SourceConfig("x", **{**values, **v}))) for v in ({}, more)
        )
        assert {key for key in one if one[key] != two[key]} == {f"data.sources.s.{key}" for key in more}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_every_document_belongs_to_one_block(tmp_path, monkeypatch, dtype):
    """Those that begin in a block are its, whole, from whichever file, also where one has none; it may shuffle them."""
    monkeypatch.setattr(blocks, "_TOKENS_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    documents = [[0, *rng.integers(1, 9, size).tolist()] for size in (0, 3, 0, 11, 4, 7, 30, 1, 3, 16)]
    files = []
    for number, some in enumerate((documents[:4], [], documents[4:7], documents[7:])):
        tokens = np.array([token for document in some for token in document], dtype)
        (tmp_path / f"{number}.bin").write_bytes(tokens.tobytes())
        files.append((tmp_path / f"{number}.bin", len(tokens)))
    for size in (1, 2, 10, 25, 1000):
        monkeypatch.setattr(blocks, "BLOCK_TOKENS", size)
        cut = list(blocks.blocks_of("s", True, 0, files, np.dtype(dtype).itemsize))
        assert sum(block.bytes for block in cut) == sum(path.stat().st_size for path, _ in files)
        found = [
            token for block in cut for part in block.parts for token in blocks._tokens(part, dtype, block).tolist()
        ]
        assert found == [token for document in documents for token in document]
        for block in cut:
            tokens = np.concatenate([blocks._tokens(part, dtype, block) for part in block.parts])
            orders = [
                [
                    each.tolist()
                    for group in blocks._in_groups(tokens, replace(block, shuffle=shuffle))
                    for each in group
                ]
                for shuffle in (False, True)
            ]
            assert [token for each in orders[0] for token in each] == tokens.tolist()
            assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] == documents != orders[1]
    assert len(cut) == 1 and [block.number for block in blocks.blocks_of("s", True, 0, [], 2)] == [0]
