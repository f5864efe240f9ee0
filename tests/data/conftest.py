"""What the tests of the data share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megahybrid.config.schema import Config, SourceConfig
from megahybrid.data import Tokenizer
from megahybrid.data.prepare import prepare
from tests.data.corpora import make_config, silent, write_texts
from tests.data.formats import some_texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, str]]:
    """A prepared recipe of several shards, and its documents. Do not change its files."""
    root = tmp_path_factory.mktemp("corpus")
    texts = write_texts(root / "text", 123)
    (root / "text" / "empty.txt").touch()
    (root / "text" / "latin.txt").write_bytes(b"caf\xe9")
    (root / "text" / "other.md").write_text("not included")
    (root / "text" / "cache").mkdir()
    (root / "text" / "cache" / "x.txt").write_text("excluded folder")
    config = make_config(root, {"small": SourceConfig(str(root / "text"), exclude=["cache"])})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megahybrid.data.writing.SHARD_BYTES", 2000)
        prepare(config, silent)
    return config, texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> tuple[Path, Tokenizer]:
    """A tokenizer's file, and what is in it; its token 299 ends documents and does not begin them."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained = Tokenizer.train(some_texts(100), 299)
    trained._backend.add_special_tokens(["<eos>"])
    trained.save(file)
    return file, Tokenizer.load(file)
