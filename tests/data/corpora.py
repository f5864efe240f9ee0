"""Small corpora for the tests of the data."""

from __future__ import annotations

import random
from pathlib import Path

from megahybrid.config.schema import Config, DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig

SEQ_LENGTH = 32

_WORDS = ("state", "memory", "window", "token", "gate", "key", "value", "query", "sparse", "linear", "eviction", "rule")


def write_texts(folder: Path, documents: int, seed: int = 0) -> dict[str, str]:
    """Name → text of files written below `folder`, of 1 to 120 words each."""
    rng = random.Random(seed)
    texts = {}
    for i in range(documents):
        name = f"{'ab'[i % 2]}/{i:03}.txt"
        texts[name] = " ".join(rng.choices(_WORDS, k=rng.choice([1, 3, 20, 120]))) + rng.choice(["", "\n", "\r\n"])
    texts["odd/special.txt"] = "before <|endoftext|> after <s></s>"
    texts["odd/unicode.txt"] = "é 你好 🙂\t\x00 ﻿end"
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return texts


def make_config(root: Path, sources: dict[str, SourceConfig] | None = None, **data) -> Config:
    """A recipe whose source is root/text and whose data.path is root/data."""
    sources = {"small": SourceConfig(str(root / "text"))} if sources is None else sources
    return Config(
        run=RunConfig(str(root / "run")),
        model=ModelConfig(pattern="F", hidden_size=8, vocab_size=300),
        train=TrainConfig(
            seq_length=SEQ_LENGTH, micro_batch_size=2, global_batch_size=8, steps=1, validation_samples=7
        ),
        data=DataConfig(path=str(root / "data"), sources=sources, **{"validation_fraction": 0.1, "workers": 1, **data}),
    )


def silent(_: str) -> None:
    """Reports nothing."""
