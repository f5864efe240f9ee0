"""Our reader and mosaicml-streaming's give the same samples, and reading needs nothing of that library."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from streaming.base.format import reader_from_json
from streaming.base.local import LocalDataset

import megahybrid
from megahybrid.config import save_config
from megahybrid.data import open_prepared
from megahybrid.data.mds import index_of, parse_index, token_dtype
from megahybrid.data.prepared import open_store
from megahybrid.data.shards import ShardReader
from megahybrid.data.writing import SampleWriter


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() == {"tokens", "borders"}
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].tolist() == theirs[name].tolist()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_library_reads_what_prepare_writes(corpus, split):
    config, _ = corpus
    prepared = open_prepared(config)
    theirs = LocalDataset(f"{config.data.path}/small/{split}")
    ours = ShardReader(prepared, open_store(config), split, ["small"], prepared.seq_length)
    try:
        assert len(ours) == len(theirs) == prepared.samples(split) > 10
        for index in range(len(ours)):
            assert_equal(ours[index], theirs[index])
    finally:
        ours.close()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_library_reads_every_width(tmp_path, dtype):
    """One, two and four bytes for the number of borders, several shards, the largest token of the dtype."""
    length, rng = 70_000, np.random.default_rng(2)
    sizes = [size for borders in (1, 255, 256, 65_535, 65_536) for size in [*[0] * (borders - 1), length - borders]]
    documents = [np.concatenate([[0], rng.integers(1, np.iinfo(dtype).max, size, endpoint=True)]) for size in sizes]
    with SampleWriter(tmp_path, length, dtype, shard_bytes=1_000_000) as writer:
        writer.add([*documents, [0, 1]])
    entries = parse_index((tmp_path / "index.json").read_bytes(), length, dtype)
    assert sum(entry.samples for entry in entries) == writer.samples == 5 and len(entries) > 1
    widths = set()
    for entry in entries:
        path = str(tmp_path / entry.basename)
        entry.layout.check(path, entry.samples)
        facts = entry.layout.entry(int(entry.basename.split(".")[1]), entry.samples, entry.bytes, entry.xxh64)
        theirs = reader_from_json(str(tmp_path), "", facts)
        for index in range(entry.samples):
            sample = entry.layout.read(path, index)
            assert_equal(sample, theirs[index])
            widths.add(len(sample["borders"]))
    assert widths == {1, 255, 256, 65_535, 65_536}


def test_an_index_is_read_as_it_was_written(tmp_path):
    with SampleWriter(tmp_path, 4, "uint16", shard_bytes=400) as writer:
        writer.add([[0, 1, 2, 3]] * 90)
    text = (tmp_path / "index.json").read_bytes()
    entries = parse_index(text, 4, "uint16")
    again = [each.layout.entry(number, each.samples, each.bytes, each.xxh64) for number, each in enumerate(entries)]
    assert len(entries) > 9 and index_of(again).encode() == text
    assert all((tmp_path / entry.basename).stat().st_size == entry.bytes <= 400 for entry in entries)
    for length, dtype in ((5, "uint16"), (4, "uint32")):
        with pytest.raises(ValueError, match="column_encodings"):
            parse_index(text, length, dtype)


def test_token_dtype_follows_the_vocabulary():
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")


def test_only_downloads_import_the_library():
    """And those only once they are needed: nowhere else does a start pay its seconds."""
    root, found = Path(megahybrid.__file__).parent, {}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if any(name and name.split(".")[0] == "streaming" for name in names):
                found[path.relative_to(root).as_posix()] = node.col_offset
    assert found.keys() == {"data/downloads.py"} and found["data/downloads.py"] > 0


_READ = """
import sys
sys.modules["streaming"] = None  # an import of it fails
from megahybrid.config import load_config
from megahybrid.data import TrainingData, validation_batches
config = load_config(sys.argv[1])
with TrainingData(config, 0, 1) as data, validation_batches(config, 0, 1) as validation:
    print(data.next_step()[0].tokens.tolist(), len(list(validation)))
"""


def test_local_data_is_read_without_the_library(corpus, tmp_path):
    config, _ = corpus
    save_config(config, tmp_path / "recipe.yaml")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _READ, str(tmp_path / "recipe.yaml")]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stderr
    from megahybrid.data import TrainingData, validation_batches

    with TrainingData(config, 0, 1) as data, validation_batches(config, 0, 1) as validation:
        assert said.stdout.split("\n")[0] == f"{data.next_step()[0].tokens.tolist()} {len(list(validation))}"
