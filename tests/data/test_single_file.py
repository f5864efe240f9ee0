"""A source that is a single file gives what a folder that holds only it gives."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megahybrid.config.schema import Config, SourceConfig
from megahybrid.data import open_prepared, workers
from megahybrid.data.documents import Skipped
from megahybrid.data.planning import plan
from megahybrid.data.prepare import prepare
from megahybrid.errors import UserError
from tests.data.corpora import make_config, silent
from tests.data.formats import ids_of, recipe, some_texts, write_jsonl, write_parquet
from tests.data.test_prepare import assert_same_files


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Small files are cut, too."""
    monkeypatch.setattr("megahybrid.data.planning._SMALLEST_UNIT", 3000)
    monkeypatch.setattr("megahybrid.data.blocks.BLOCK_TOKENS", 2000)
    monkeypatch.setattr(os, "fsync", lambda file: None)


def twice(root: Path, file: Path, tokenizer: Path | None, **values) -> tuple[Config, Config]:
    """Recipes of a file beside which others lie, and of a folder that holds a copy of it alone."""
    alone = root / "alone"
    alone.mkdir()
    shutil.copy(file, alone)
    configs = []
    for name, path in (("single", file), ("folder", alone)):
        config = recipe(root, tokenizer, s=SourceConfig(str(path), **values))
        configs.append(replace(config, data=replace(config.data, path=str(root / name))))
    return configs[0], configs[1]


def assert_same_shards(single: Config, folder: Config) -> None:
    assert single.data.path is not None and folder.data.path is not None
    one, other = prepare(single, silent), prepare(folder, silent)
    assert_same_files(Path(single.data.path) / "s", Path(folder.data.path) / "s")
    assert (one.sources, one.identity) == (other.sources, other.identity)
    assert one.settings.pop("data.sources.s.path") != other.settings.pop("data.sources.s.path")
    assert one.settings == other.settings


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet", "x.npy", "x.bin"])
def test_a_file_gives_the_shards_of_its_folder(tmp_path, tokenizer, small_parts, name):
    file, known = tokenizer
    values: dict = {"format": name.split(".")[1]}
    texts = some_texts(90)
    (tmp_path / "many").mkdir()
    for each, some in (("0." + name, some_texts(5, seed=1)), (name, texts)):
        path = tmp_path / "many" / each
        if values["format"] == "jsonl":
            write_jsonl(path, some)
        elif values["format"] == "parquet":
            write_parquet(path, some)
        elif values["format"] == "npy":
            np.save(path, np.array(ids_of(known, some), np.uint16))
        else:
            values["dtype"] = "uint16"
            path.write_bytes(np.array(ids_of(known, some), "<u2").tobytes())
    single, folder = twice(tmp_path, tmp_path / "many" / name, file, **values)
    assert len(plan(single, Skipped())["s"]) > 1 or name.endswith("gz")
    assert_same_shards(single, folder)
    documents = [counts.documents for counts in open_prepared(single).sources["s"].values()]
    assert sum(documents) == len(texts) and min(documents) > 0


def test_a_text_is_one_document_and_trained_on(tmp_path, small_parts):
    """Also its tokenizer is that of the folder."""
    for name in ("book.txt", "other.txt"):
        (tmp_path / name).write_text(f"{name} " * 900)
    single, folder = twice(tmp_path, tmp_path / "book.txt", None)
    said: list[str] = []
    prepare(replace(single, data=replace(single.data, path=str(tmp_path / "said"))), said.append)
    assert (
        "Validation will be without s, since a single document is trained on; cut it into several to hold some out."
        in said
    )
    assert not any("Passed over" in line for line in said)
    assert_same_shards(single, folder)
    counts = open_prepared(single).sources["s"]
    assert (counts["train"].documents, counts["validation"].documents) == (1, 0)


def test_a_path_is_relative_to_where_prepare_runs_and_may_be_a_link(tmp_path, monkeypatch):
    (tmp_path / "blob").write_text("word " * 300)
    (tmp_path / "book.md").symlink_to("blob")
    monkeypatch.chdir(tmp_path)
    for path in ("book.md", "./book.md", "~/book.md"):
        monkeypatch.setenv("HOME", str(tmp_path))
        (unit,) = plan(make_config(tmp_path, {"s": SourceConfig(path)}), Skipped())["s"]
        assert Path(unit.root) == tmp_path
        assert [(piece.name, piece.end) for piece in unit.pieces] == [("book.md", 1500)]


def test_a_file_may_have_any_name_that_include_has(tmp_path, tokenizer):
    file, known = tokenizer
    np.array(ids_of(known, some_texts(60)), "<u2").tofile(tmp_path / "tokens.npy")
    write_jsonl(tmp_path / "lines.json", some_texts(60))
    for name, values in {
        "tokens.npy": {"format": "bin", "dtype": "uint16"},
        "lines.json": {"format": "jsonl", "include": ["*.jsonl", "*.json"], "exclude": ["cache"]},
    }.items():
        config = recipe(tmp_path, file, s=SourceConfig(str(tmp_path / name), **values))
        config.data.path = str(tmp_path / f"{name}-data")
        counts = prepare(config, silent).sources["s"]
        assert sum(each.documents for each in counts.values()) == 66
    write_jsonl(tmp_path / "x.jsonl", ["x"])
    meant = SourceConfig(str(tmp_path / "x.jsonl"), include=["*.jsonl"])
    (unit,) = plan(recipe(tmp_path, None, s=meant), Skipped())["s"]
    assert (unit.format, len(unit.pieces)) == ("text", 1)


def test_a_file_that_is_hardly_meant_is_refused_in_one_sentence(tmp_path):
    for name in ("x.jsonl", "x.jsonl.zst", "x.npy", "x.py"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "empty.txt").touch()
    os.mkfifo(tmp_path / "pipe")
    cases = {
        r"x\.jsonl' has a name of format jsonl, .* set it to jsonl, or include to \['\*\.jsonl'\] if": ("x.jsonl", []),
        r"zst' has a name of format jsonl, .* include to \['\*\.jsonl\.zst'\]": ("x.jsonl.zst", []),
        r"has a name of format npy, but data\.sources\.s\.format is text": ("x.npy", []),
        r"x\.py' is a file that data\.sources\.s\.include \[\*\.txt, \*\.md\] leaves out": ("x.py", ["*.txt", "*.md"]),
        r"empty\.txt' is an empty file": ("empty.txt", []),
        r"pipe' is not a folder or a file; give what holds its documents": ("pipe", []),
        r"absent\.txt' is not a folder or a file": ("absent.txt", []),
    }
    for expected, (name, include) in cases.items():
        with pytest.raises(UserError, match=expected) as error:
            prepare(recipe(tmp_path, None, s=SourceConfig(str(tmp_path / name), include=include)), silent)
        message = str(error.value)
        assert "\n" not in message and message.endswith(".") and ". " not in message, message


def test_an_interrupted_prepare_of_a_file_goes_on_unless_it_changed(tmp_path, tokenizer, small_parts, monkeypatch):
    """With two workers to the bytes of one; a file beside it changes nothing."""
    source = tmp_path / "x.jsonl"
    write_jsonl(source, some_texts(150))
    single, folder = twice(tmp_path, source, tokenizer[0], format="jsonl")
    parts = len(plan(single, Skipped())["s"])
    assert parts > 4
    write = workers.write_unit

    def stopped() -> None:
        calls: list[int] = []

        def fail(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            write(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(workers, "write_unit", fail)
            with pytest.raises(KeyboardInterrupt):
                prepare(single, silent)

    stopped()
    write_jsonl(tmp_path / "y.jsonl", some_texts(9))
    said: list[str] = []
    prepare(replace(single, data=replace(single.data, workers=2)), said.append)
    assert f"Tokenised before: 3 of {parts} parts." in said
    assert_same_shards(single, folder)
    shutil.rmtree(tmp_path / "single")
    stopped()
    changed = source.stat().st_mtime_ns + 1_000_000_000
    os.utime(source, ns=(changed, changed))
    said.clear()
    prepare(single, said.append)
    assert not any("before" in line for line in said)
