"""Texts survive the shards exactly, and an unfinished prepare is never trusted."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megahybrid.config.schema import SourceConfig
from megahybrid.data import Tokenizer, open_prepared, prepare
from megahybrid.data.documents import Document, Skipped, list_documents, split_documents
from megahybrid.data.shards import ShardReader
from megahybrid.data.writing import SampleWriter, token_dtype
from megahybrid.errors import UserError
from tests.data.corpora import SEQ_LENGTH, make_config, silent, write_texts


def read_stream(config, split):
    """The split's token stream, put together again, and its borders as positions in it."""
    prepared = open_prepared(config)
    reader = ShardReader(prepared, split, seed=1, shuffle_block_size=64)
    samples = [reader[i] for i in range(reader.size)]
    for first, second in pairwise(samples):
        assert first["tokens"][-1] == second["tokens"][0]
    stream = np.concatenate([sample["tokens"][:-1] for sample in samples] + [samples[-1]["tokens"][-1:]])
    borders = [sample["borders"].tolist() for sample in samples]
    reader.close()
    return stream.tolist(), borders


def documents_of(stream, tokenizer):
    parts, current = [], None
    for token in stream:
        if token == tokenizer.document_id:
            current = []
            parts.append(current)
        else:
            current.append(token)
    return [tokenizer.decode(part) for part in parts]


def test_the_shards_decode_to_the_documents(corpus):
    config, texts = corpus
    tokenizer = Tokenizer.load(Path(config.data.path) / "tokenizer")
    found = {split: documents_of(read_stream(config, split)[0], tokenizer) for split in ("train", "validation")}
    ordered = list_documents("small", config.data.sources["small"], Skipped())
    ordered = [document for document in ordered if document.name != "latin.txt"]
    assert sorted(document.name for document in ordered) == sorted(texts)
    assert [document.name for document in ordered] != sorted(texts)
    sides = split_documents(ordered, config.data.validation_fraction)
    for split, side in zip(("train", "validation"), sides, strict=True):
        expected = [texts[document.name] for document in side]
        kept = found[split]
        lost = expected[len(kept) :]  # the tail that did not fill a sample
        assert sum(len(tokenizer.encode(text)) + 1 for text in lost) <= SEQ_LENGTH
        assert kept[:-1] == expected[: len(kept) - 1]
        assert expected[len(kept) - 1].startswith(kept[-1].rstrip("�"))


def test_borders_are_the_documents_first_tokens(corpus):
    config, _ = corpus
    stream, borders = read_stream(config, "train")
    document_id = open_prepared(config).document_id
    assert len(borders) > 50
    for i, offsets in enumerate(borders):
        inside = stream[i * SEQ_LENGTH : (i + 1) * SEQ_LENGTH]
        assert offsets == [0] + [at for at in range(1, SEQ_LENGTH) if inside[at] == document_id]


def test_counts_and_hashes(corpus):
    config, texts = corpus
    counts = open_prepared(config).sources["small"]
    assert counts["train"].documents + counts["validation"].documents == len(texts)
    assert counts["train"].bytes + counts["validation"].bytes == sum(len(text.encode()) for text in texts.values())
    for split in counts.values():
        assert split.samples == (split.tokens - 1) // SEQ_LENGTH
    index = json.loads((Path(config.data.path) / "small" / "train" / "index.json").read_text())
    assert len(index["shards"]) > 3
    assert all(set(shard["raw_data"]["hashes"]) == {"xxh64"} for shard in index["shards"])


@pytest.mark.parametrize("pieces", [[10], [3, 3, 4], [1] * 10])
def test_cutting_does_not_depend_on_the_batches(tmp_path, pieces):
    rng = np.random.default_rng(0)
    documents = [[0, *rng.integers(1, 9, size)] for size in (0, 3, 0, 11, 4, 7, 8, 1, 3, 16)]
    flat = [token for document in documents for token in document]
    written = []
    with SampleWriter(tmp_path / "out", 4, "uint16") as writer:
        write = writer._writer.write
        writer._writer.write = lambda sample: (written.append(sample), write(sample))
        for size in pieces:
            writer.add(documents[:size])
            documents = documents[size:]
    assert [sample["tokens"].tolist() for sample in written] == [flat[i : i + 5] for i in range(0, len(flat) - 4, 4)]
    for sample in written:
        assert sample["borders"].tolist() == [0] + [i for i in (1, 2, 3) if sample["tokens"][i] == 0]


def test_token_dtype_follows_the_vocabulary(tmp_path):
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")
    with SampleWriter(tmp_path / "out", 4, "uint32") as writer:
        writer.add([[0, 65_536, 100_000, 1, 2]])
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["shards"][0]["column_encodings"] == ["ndarray:int32", "ndarray:uint32:5"]
    with pytest.raises(OverflowError), SampleWriter(tmp_path / "small", 4, "uint16") as writer:
        writer.add([[0, 65_536, 1, 2, 3]])


def test_the_split_depends_on_names_only_and_leaves_no_side_empty():
    documents = [Document("s", f"{i}.txt", Path("/nowhere"), 1) for i in range(1000)]
    train, validation = split_documents(documents, 0.1)
    assert 60 < len(validation) < 140
    assert sorted([*train, *validation], key=documents.index) == documents
    fewer = documents[::2]
    assert split_documents(fewer, 0.1)[1] == [document for document in validation if document in fewer]
    assert split_documents(documents, 0.0) == (documents, [])
    assert len(split_documents(documents[:50], 1e-9)[1]) == 1
    assert [len(side) for side in split_documents(documents[:2], 0.999)] == [1, 1]
    assert split_documents(documents[:1], 0.5) == (documents[:1], [])


def test_the_same_text_gives_the_same_files(corpus, tmp_path, monkeypatch):
    config, _ = corpus
    monkeypatch.setattr("megahybrid.data.writing.SHARD_BYTES", 4000)
    again = replace(config, data=replace(config.data, path=str(tmp_path / "data")))
    prepare(again, silent)
    files = {file.relative_to(config.data.path): file for file in Path(config.data.path).rglob("*") if file.is_file()}
    assert len(files) > 6
    for name, file in files.items():
        assert (tmp_path / "data" / name).read_bytes() == file.read_bytes()


def test_a_second_prepare_does_nothing_and_other_settings_are_refused(corpus):
    config, _ = corpus
    before = {file: file.stat().st_mtime_ns for file in Path(config.data.path).rglob("*")}
    lines = []
    prepare(config, lines.append)
    assert len(lines) == 1 and "already prepared" in lines[0]
    assert {file: file.stat().st_mtime_ns for file in Path(config.data.path).rglob("*")} == before
    other = replace(config, train=replace(config.train, seq_length=16))
    with pytest.raises(UserError, match=r"train\.seq_length \(32, now 16\).*another data\.path"):
        prepare(other, silent)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_prepare_leaves_nothing(tmp_path, monkeypatch, fault):
    write_texts(tmp_path / "text", 20)
    config = make_config(tmp_path)
    add, calls = SampleWriter.add, []

    def fail(self, documents):
        add(self, documents)
        calls.append(1)
        if len(calls) == 2:
            raise fault

    monkeypatch.setattr(SampleWriter, "add", fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        prepare(config, silent)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    with pytest.raises(UserError, match="megahybrid prepare"):
        open_prepared(config)


def test_what_a_killed_prepare_left_is_swept(tmp_path):
    write_texts(tmp_path / "text", 20)
    (tmp_path / ".data.part" / "small" / "train").mkdir(parents=True)
    (tmp_path / ".data.part" / "small" / "train" / "shard.00000.mds").write_text("half")
    (tmp_path / ".data.part" / "junk").write_text("junk")
    prepare(make_config(tmp_path), silent)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["dataset.json", "small", "tokenizer"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text"]


def test_two_prepares_at_once(tmp_path, monkeypatch):
    write_texts(tmp_path / "text", 20)
    config, messages = make_config(tmp_path), []

    def second(_):
        if not messages:
            with pytest.raises(UserError) as error:
                prepare(config, silent)
            messages.append(str(error.value))

    prepare(config, second)
    assert "Another prepare is writing" in messages[0]


def _one_sentence(message: str) -> bool:
    return "\n" not in message and message.endswith(".") and ". " not in message


def test_bad_inputs_are_refused_in_one_sentence(tmp_path):
    write_texts(tmp_path / "text", 20)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    (tmp_path / "file").touch()
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "latin.txt").write_bytes(b"\xe9" * 500)
    (tmp_path / "bad.json").write_text("{")
    text = str(tmp_path / "text")

    def config(sources=None, seq_length=SEQ_LENGTH, vocab_size=300, **data):
        base = make_config(tmp_path, sources, **data)
        train, model = replace(base.train, seq_length=seq_length), replace(base.model, vocab_size=vocab_size)
        return replace(base, train=train, model=model)

    cases = {
        "data.sources is empty": config({}),
        "is not a folder": config({"x": SourceConfig(str(tmp_path / "absent"))}),
        "finds no text": config({"x": SourceConfig(str(tmp_path / "nothing"))}),
        r"matches \[\*\.py\]": config({"x": SourceConfig(text, include=["*.py"])}),
        "needs another name": config({"tokenizer": SourceConfig(text)}),
        "a folder beside": config({"../x": SourceConfig(text)}),
        "0 tokens to train on": config({"x": SourceConfig(str(tmp_path / "bytes"))}),
        "less than one sample": config(seq_length=100_000),
        "needs at least 257": config(vocab_size=256),
        "There is no tokenizer": config(tokenizer=str(tmp_path / "nothing")),
        "not a readable tokenizer": config(tokenizer=str(tmp_path / "bad.json")),
    }
    for expected, recipe in cases.items():
        with pytest.raises(UserError, match=expected) as error:
            prepare(recipe, silent)
        assert _one_sentence(str(error.value)), str(error.value)
    for name, expected in {
        "mine": "was not made by prepare",
        "file": "was not made",
        "file/x": "cannot be wri",
    }.items():
        recipe = config()
        recipe.data.path = str(tmp_path / name)
        with pytest.raises(UserError, match=expected) as error:
            prepare(recipe, silent)
        assert _one_sentence(str(error.value)), str(error.value)
    assert (tmp_path / "mine" / "precious").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or path.name == "data"]
