"""Prepared data as an enemy would change it: every hash above the change is made to fit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from megahybrid.config.schema import Config


class Foreign:
    """A copy of prepared data of one source, `small`, whose training split is changed."""

    def __init__(self, config: Config, root: Path):
        self.root = root / "some" / "where"
        self.folder = self.root / "small" / "train"
        shutil.copytree(config.data.path, self.root)
        self.local = replace(config, data=replace(config.data, path=str(self.root)))
        self.cache = root / "cache" / "of" / "a" / "node"
        remote = replace(config.data, path="unused", remote=str(self.root), cache=str(self.cache))
        self.remote = replace(config, data=remote)

    def change_dataset(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change dataset.json."""
        file = self.root / "dataset.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    def write_index(self, text: str) -> None:
        """Replace index.json."""
        (self.folder / "index.json").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.change_dataset(lambda values: values["sources"]["small"]["train"].update(index_sha256=digest))

    def change_index(self, change: Callable[[list[dict[str, Any]]], Any]) -> None:
        """Change the list of shards."""
        index = json.loads((self.folder / "index.json").read_text())
        change(index["shards"])
        self.write_index(json.dumps(index))

    def write_shard(self, number: int, data: bytes, **entry: Any) -> None:
        """Replace a shard, and what the index says of it."""
        name = f"shard.{number:05}.mds"
        (self.folder / name).write_bytes(data)
        raw = {"basename": name, "bytes": len(data), "hashes": {"xxh64": xxhash.xxh64(data).hexdigest()}}
        self.change_index(lambda shards: shards[number].update(raw_data=raw, **entry))

    def read_shard(self, number: int) -> bytearray:
        """A shard's bytes."""
        return bytearray((self.folder / f"shard.{number:05}.mds").read_bytes())
