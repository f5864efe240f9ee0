"""Texts survive the shards exactly, and an unfinished prepare is never trusted."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset

from megahybrid.config import save_config
from megahybrid.config.schema import SourceConfig
from megahybrid.data import Tokenizer, open_prepared, workers
from megahybrid.data.documents import Skipped, split_names
from megahybrid.data.planning import plan
from megahybrid.data.prepare import prepare
from megahybrid.data.prepared import open_store
from megahybrid.data.shards import ShardReader
from megahybrid.data.units import Format
from megahybrid.data.workers import write_all
from megahybrid.data.writing import SampleWriter
from megahybrid.errors import UserError
from tests.data.corpora import SEQ_LENGTH, make_config, silent, write_texts
from tools.workers import environment, python


def read_stream(config, split):
    """The split's token stream, put together again, and its borders as positions in it."""
    prepared = open_prepared(config)
    reader = ShardReader(prepared, open_store(config), split, ["small"], prepared.seq_length)
    samples = [reader[i] for i in range(len(reader))]
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
    pieces = [piece for unit in plan(config, Skipped())["small"] for piece in unit.pieces if piece.name != "latin.txt"]
    assert sorted(piece.name for piece in pieces) == sorted(texts)
    assert [piece.name for piece in pieces] != sorted(texts)
    for split in ("train", "validation"):
        expected = [texts[piece.name] for piece in pieces if piece.split == split]
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
    with SampleWriter(tmp_path / "out", 4, "uint16") as writer:
        for size in pieces:
            writer.add(documents[:size])
            documents = documents[size:]
    written = list(StreamingDataset(local=str(tmp_path / "out"), batch_size=1))
    assert [sample["tokens"].tolist() for sample in written] == [flat[i : i + 5] for i in range(0, len(flat) - 4, 4)]
    for sample in written:
        assert sample["borders"].tolist() == [0] + [i for i in (1, 2, 3) if sample["tokens"][i] == 0]


def test_the_shards_are_those_of_the_librarys_writer(tmp_path):
    """Byte for byte, with one, two and four bytes for the number of borders."""
    rng = np.random.default_rng(1)
    length = 70_000
    columns = {"tokens": f"ndarray:uint16:{length + 1}", "borders": "ndarray:int32"}
    sizes = [size for borders in (255, 256, 65_535, 65_536) for size in [*[0] * (borders - 1), length - borders]]
    sizes += [5] * 40 + [300_000, 9]
    documents = [np.concatenate([[0], rng.integers(1, 9, size)]) for size in sizes]
    stream = np.concatenate(documents).astype(np.uint16)
    with SampleWriter(tmp_path / "ours", length, "uint16", shard_bytes=600_000) as writer:
        writer.add(documents)
    with MDSWriter(columns=columns, out=str(tmp_path / "theirs"), hashes=["xxh64"], size_limit=600_000) as theirs:
        for begin in range(0, len(stream) - length, length):
            inside = np.flatnonzero(stream[begin : begin + length] == 0)
            borders = np.unique([0, *inside]).astype(np.int32)
            theirs.write({"tokens": stream[begin : begin + length + 1], "borders": borders})
    assert writer.samples == (len(stream) - 1) // length
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def test_a_token_that_does_not_fit_the_dtype_is_an_error(tmp_path):
    with SampleWriter(tmp_path / "out", 4, "uint32") as writer:
        writer.add([[0, 65_536, 100_000, 1, 2]])
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["shards"][0]["column_encodings"] == ["ndarray:int32", "ndarray:uint32:5"]
    with pytest.raises(OverflowError), SampleWriter(tmp_path / "small", 4, "uint16") as writer:
        writer.add([[0, 65_536, 1, 2, 3]])


def test_the_split_depends_on_names_only_and_leaves_no_side_empty():
    names = [f"{i}.txt" for i in range(1000)]
    held = split_names("s", names, 0.1)
    assert 60 < len(held) < 140 and held != split_names("t", names, 0.1)
    assert split_names("s", names[::2], 0.1) == held & set(names[::2])
    assert split_names("s", names, 0.0) == set()
    assert len(split_names("s", names[:50], 1e-9)) == 1
    assert len(split_names("s", names[:2], 0.999)) == 1
    assert split_names("s", names[:1], 0.5) == set()


def test_the_same_text_gives_the_same_files(corpus, tmp_path, monkeypatch):
    config, _ = corpus
    monkeypatch.setattr("megahybrid.data.writing.SHARD_BYTES", 2000)
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
    assert f'data.identity "{open_prepared(config).identity}"' in lines[0]
    assert {file: file.stat().st_mtime_ns for file in Path(config.data.path).rglob("*")} == before
    other = replace(config, train=replace(config.train, seq_length=16))
    with pytest.raises(UserError, match=r"train\.seq_length \(32, now 16\).*another data\.path"):
        prepare(other, silent)


def test_another_tokenizer_than_the_prepared_one_is_refused(corpus, tokenizer, tmp_path):
    config, _ = corpus
    file, _ = tokenizer
    other = replace(config, data=replace(config.data, tokenizer=str(file)))
    with pytest.raises(UserError, match=f"another tokenizer than data.tokenizer '{file}'; prepare into another"):
        open_prepared(other)
    was = r"another data\.tokenizer \(one that prepare trains, now sha256:[0-9a-f]{16}\); remove it"
    with pytest.raises(UserError, match=was):
        prepare(other, silent)
    same, moved = open_prepared(config).tokenizer_file, tmp_path / "not on this host"
    for path in (same, same.parent, moved):
        found = open_prepared(replace(config, data=replace(config.data, tokenizer=str(path))))
        assert found.identity == open_prepared(config).identity


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize(("job", "said"), [("write_unit", "Tokenised"), ("write_block", "Cut")])
def test_an_interrupted_prepare_is_not_trusted_and_goes_on(tmp_path, monkeypatch, fault, job, said):
    write_texts(tmp_path / "text", 60)
    monkeypatch.setattr("megahybrid.data.planning._SMALLEST_UNIT", 4000)
    monkeypatch.setattr("megahybrid.data.blocks.BLOCK_TOKENS", 1000)
    config = make_config(tmp_path)
    whole = replace(config, data=replace(config.data, path=str(tmp_path / "whole")))
    prepare(whole, silent)
    write, calls = getattr(workers, job), []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise fault
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(workers, job, fail)
        with pytest.raises((UserError, KeyboardInterrupt)):
            prepare(config, silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.part", "text", "whole"]
    with pytest.raises(UserError, match="megahybrid prepare"):
        open_prepared(config)
    lines = []
    prepare(config, lines.append)
    assert any(line.startswith(f"{said} before: 3 of ") for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text", "whole"]
    assert_same_files(tmp_path / "data", tmp_path / "whole")


def assert_same_files(one: Path, other: Path):
    def files(root):
        return {path.relative_to(root) for path in root.rglob("*") if path.is_file()}

    assert files(one) == files(other) and len(files(one)) > 2
    for name in files(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_finished_parts_that_were_damaged_or_belong_to_other_text_are_made_anew(tmp_path, monkeypatch):
    texts = write_texts(tmp_path / "text", 60)
    monkeypatch.setattr("megahybrid.data.planning._SMALLEST_UNIT", 4000)
    monkeypatch.setattr("megahybrid.data.blocks.BLOCK_TOKENS", 1000)
    config = make_config(tmp_path)
    whole = replace(config, data=replace(config.data, path=str(tmp_path / "whole")))
    prepare(whole, silent)

    def stop_at_assembly(*_):
        raise KeyboardInterrupt

    def stopped():
        with monkeypatch.context() as patch:
            patch.setattr("megahybrid.data.prepare.assemble", stop_at_assembly)
            with pytest.raises(KeyboardInterrupt):
                prepare(config, silent)
        return [sorted((tmp_path / ".data.part" / kind / "small").iterdir()) for kind in ("units", "blocks")]

    (first, second, third, *others), (block, *blocks) = stopped()
    for file in (first / "train.bin", next(block.rglob("*.mds"))):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    (second / "validation.bin").write_bytes(b"other")
    (third / "done.json").unlink()
    (third.parent / ".000099.1.part").mkdir()
    (tmp_path / ".data.part" / "junk").write_text("junk")
    lines = []
    prepare(config, lines.append)
    assert f"Tokenised before: {len(others)} of {len(others) + 3} parts." in lines
    assert f"Cut before: {len(blocks)} of {len(blocks) + 1} parts." in lines
    assert_same_files(tmp_path / "data", tmp_path / "whole")

    (tmp_path / "data").rename(tmp_path / "old")
    stopped()
    name = max(texts, key=lambda name: len(texts[name]))
    (tmp_path / "text" / name).write_text("other " + texts[name][6:])  # as long as before
    lines = []
    prepare(config, lines.append)
    assert not any(" before: " in line for line in lines)


def test_the_result_does_not_depend_on_the_workers_or_on_kills(tmp_path, monkeypatch):
    """Two processes, the parent killed in the middle, then one process: the same bytes as one process at once."""
    write_texts(tmp_path / "text", 150)
    monkeypatch.setattr("megahybrid.data.planning._SMALLEST_UNIT", 4000)
    config = make_config(tmp_path)
    whole = replace(config, data=replace(config.data, path=str(tmp_path / "whole")))
    prepare(whole, silent)
    recipe = tmp_path / "recipe.yaml"
    save_config(replace(config, data=replace(config.data, workers=2)), recipe)
    script = (
        "import sys; from megahybrid.config import load_config; from megahybrid.data import planning;"
        "from megahybrid.data.prepare import prepare; planning._SMALLEST_UNIT = 4000; prepare(load_config(sys.argv[1]))"
    )
    process = subprocess.Popen([python(), "-c", script, str(recipe)], env=environment(), stdout=subprocess.PIPE)
    units = tmp_path / ".data.part" / "units" / "small"
    deadline = time.monotonic() + 60
    while not list(units.glob("0*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert list(units.glob("0*"))
    lines = []
    prepare(config, lines.append)
    assert any(line.startswith("Tokenised before: ") for line in lines)
    assert_same_files(tmp_path / "data", tmp_path / "whole")


def test_a_worker_that_fails_or_dies_is_named(tmp_path, monkeypatch):
    write_texts(tmp_path / "text", 20)
    (tmp_path / "data").mkdir()
    units = plan(make_config(tmp_path), Skipped())["small"]
    Tokenizer.train(["text"], 257).save(tmp_path / "tokenizer.json")
    made = Format(str(tmp_path / "tokenizer.json"), SEQ_LENGTH, "uint16", 4000)
    absent = replace(units[0], root=str(tmp_path / "absent"))
    jobs = [(absent, tmp_path / "u" / "0"), (absent, tmp_path / "u" / "1")]
    with pytest.raises(UserError, match="cannot be read: No such file"):
        write_all(jobs, made, 2, lambda size: None)
    monkeypatch.setattr("megahybrid.data.workers.sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="process of prepare died"):
        write_all(jobs, made, 2, lambda size: None)


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
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tokenizer.model").touch()
    text = str(tmp_path / "text")

    def config(sources=None, seq_length=SEQ_LENGTH, vocab_size=300, **data):
        base = make_config(tmp_path, sources, **data)
        train, model = replace(base.train, seq_length=seq_length), replace(base.model, vocab_size=vocab_size)
        return replace(base, train=train, model=model)

    cases = {
        "data.sources is empty": config({}),
        "is not a folder or a file; give what": config({"x": SourceConfig(str(tmp_path / "absent"))}),
        "finds no text": config({"x": SourceConfig(str(tmp_path / "nothing"))}),
        r"matches \[\*\.py\]": config({"x": SourceConfig(text, include=["*.py"])}),
        "needs another name": config({"tokenizer": SourceConfig(text)}),
        "a folder beside": config({"../x": SourceConfig(text)}),
        r"holds no text in its 1 files \(1 are not UTF-8": config({"x": SourceConfig(str(tmp_path / "bytes"))}),
        "less than one sample": config(seq_length=100_000),
        "needs at least 257": config(vocab_size=256),
        "There is no tokenizer": config(tokenizer=str(tmp_path / "nothing")),
        r"has tokenizer.model but no tokenizer.json; make one": config(tokenizer=str(tmp_path / "slow")),
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
