"""Every line of JSONL is read once however the files are cut, and what is no document is counted."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from megahybrid.config.schema import SourceConfig
from megahybrid.data import Tokenizer, open_prepared
from megahybrid.data.documents import Piece, Skipped, Unit
from megahybrid.data.planning import plan
from megahybrid.data.prepare import prepare
from megahybrid.data.prepared import open_store
from megahybrid.data.reading import read_unit
from megahybrid.data.shards import ShardReader
from megahybrid.errors import UserError
from tests.data.corpora import make_config, silent

NOT_JSON = [b"{", b"[1]", b"7"]
NO_TEXT = [b'{"other": "x"}', b'{"text": 5}', b'{"text": null}']
NOT_UTF8 = [b'{"text": "\xe9"}', b'{"text": "\\ud800"}']
BAD = NOT_JSON + NO_TEXT + NOT_UTF8


def lines_of(count: int, seed: int = 0) -> tuple[list[str], bytes]:
    """Texts, and a file with them, blank lines, empty texts and bad lines."""
    rng = random.Random(seed)
    texts = [f"text {i} é🙂\n \u2028 " + "word " * rng.randrange(60) for i in range(count)]
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0).encode() for i, text in enumerate(texts)]
    lines += [b"", b"  ", b'{"text": ""}', *BAD]
    rng.shuffle(lines)
    return texts, b"\r\n".join(lines[:50]) + b"\n" + b"\n".join(lines[50:])


def unit(root: Path, *pieces: Piece, fraction: float = 0.2) -> Unit:
    return Unit("s", 0, str(root), "jsonl", "text", fraction, pieces=list(pieces))


def read(one: Unit, chunk_bytes: int = 1 << 20) -> tuple[list[str], Skipped]:
    skipped = Skipped()
    return [text.text for texts, _ in read_unit(one, skipped, None, chunk_bytes) for text in texts], skipped


@pytest.mark.parametrize("size", [1, 13, 500, 10**6])
def test_every_line_belongs_to_one_part(tmp_path, size):
    texts, data = lines_of(60)
    (tmp_path / "x.jsonl").write_bytes(data)
    found, total = [], Skipped()
    for begin in range(0, len(data), size):
        each, skipped = read(unit(tmp_path, Piece("x.jsonl", begin, min(begin + size, len(data)))))
        found += each
        total.add(skipped)
    assert sorted(found) == sorted(texts)
    assert (total.empty, total.not_json, total.no_text, total.not_utf8) == (1, 3, 3, 2)
    where = total.example.split("byte ")[1]
    assert data[int(where) :].splitlines()[0] in BAD


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_read_the_same(tmp_path, suffix):
    texts, data = lines_of(60)
    if suffix == "gz":
        packed = gzip.compress(data[:900]) + gzip.compress(data[900:])  # as several members
    else:
        zstandard = pytest.importorskip("zstandard")
        packed = zstandard.compress(data[:900]) + zstandard.compress(data[900:])
    file = tmp_path / f"x.jsonl.{suffix}"
    file.write_bytes(packed)
    piece = Piece(file.name, 0, len(packed))
    skipped = Skipped()
    chunks = list(read_unit(unit(tmp_path, piece), skipped, None, 1000))
    assert sorted(text.text for chunk, _ in chunks for text in chunk) == sorted(texts)
    assert sum(taken for _, taken in chunks) == len(packed) and skipped.bad == len(BAD)
    for cut in (9, 200):
        file.write_bytes(packed[:-cut])
        with pytest.raises(UserError, match="ends too early"):
            read(unit(tmp_path, piece))
    for damaged in (data, packed[:100] + bytes(50) + packed[150:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read(unit(tmp_path, piece))


def test_lines_come_in_order_in_bounded_chunks_and_are_split_by_their_text(tmp_path):
    _, data = lines_of(400)
    (tmp_path / "x.jsonl").write_bytes(data)
    piece = Piece("x.jsonl", 0, len(data))
    chunks = list(read_unit(unit(tmp_path, piece), Skipped(), None, 5000))
    assert len(chunks) > 5 and all(sum(text.bytes for text in chunk) < 6000 for chunk, _ in chunks)
    assert sum(taken for _, taken in chunks) == len(data)
    found = [text for chunk, _ in chunks for text in chunk]
    in_file = [json.loads(line)["text"] for line in data.splitlines() if b'"id"' in line]
    assert [text.text for text in found] == in_file
    held = {text.text for text in found if text.split == "validation"}
    assert 40 < len(held) < 120
    (tmp_path / "y.jsonl").write_bytes(b"\n".join(reversed(data.splitlines())))
    other = [text for chunk, _ in read_unit(unit(tmp_path, Piece("y.jsonl", 0, 10**9)), Skipped()) for text in chunk]
    assert {text.text for text in other if text.split == "validation"} == held


def test_jsonl_is_prepared_whole_from_many_parts(tmp_path, monkeypatch):
    """Parts share their tails: less than one sample is lost, and no document runs on into another's."""
    monkeypatch.setattr("megahybrid.data.planning._SMALLEST_UNIT", 3000)
    monkeypatch.setattr("megahybrid.data.writing.SHARD_BYTES", 3000)
    monkeypatch.setattr("megahybrid.data.blocks.BLOCK_TOKENS", 1000)
    (tmp_path / "text").mkdir()
    texts, data = lines_of(300)
    (tmp_path / "text" / "x.jsonl").write_bytes(data)
    more, data = lines_of(40, seed=1)
    (tmp_path / "text" / "y.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "text" / "z.txt").write_text("of another format")
    config = make_config(tmp_path, {"s": SourceConfig(str(tmp_path / "text"), format="jsonl")})
    assert len(plan(config, Skipped())["s"]) > 10
    said = []
    prepared = prepare(config, said.append)
    passed_over = "2 empty, 4 not UTF-8, 6 not JSON objects, 6 without the field (the first: "
    assert any(f"1 of names that include leaves out, {passed_over}" in line for line in said)
    counts = prepared.sources["s"]
    assert sum(count.documents for count in counts.values()) == 340
    assert sum(count.bytes for count in counts.values()) == sum(len(text.encode()) for text in [*texts, *more])
    assert counts["validation"].samples == (counts["validation"].tokens - 1) // 32
    assert (counts["train"].tokens - 1) // 32 <= counts["train"].samples < counts["train"].tokens // 32 + 12
    tokenizer = Tokenizer.load(prepared.tokenizer_file)
    known = set(texts) | set(more)
    whole = 0
    for split in counts:
        reader = ShardReader(open_prepared(config), open_store(config), split, ["s"], 32)
        parts: list[list[int]] = []
        last = None
        for i in range(len(reader)):
            sample = reader[i]
            tokens = sample["tokens"].tolist()
            if i == 0 or tokens[0] != last:  # where one part's shards end
                parts.append([])
            for at, token in enumerate(tokens[:-1]):
                assert (token == prepared.document_id) == (at in sample["borders"]) or at == 0
                if token == prepared.document_id:
                    parts.append([])
                else:
                    parts[-1].append(token)
            last = tokens[-1]
        for part in parts:
            text = tokenizer.decode(part)
            whole += text in known
            assert text in known or any(text.strip("�") in each for each in known)
    assert whole > 300


def test_a_source_without_any_usable_line_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "x.jsonl").write_bytes(b'{"content": "x"}\n{\n')
    source = SourceConfig(str(tmp_path / "text"), format="jsonl")
    with pytest.raises(UserError, match=r"no line with a text under 'text' \(1 are not JSON objects, 1 lack it"):
        prepare(make_config(tmp_path, {"s": source}), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
