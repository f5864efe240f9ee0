"""Finished blocks → the source's splits: all shards under one index, and what was left over laid together."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megahybrid.data.documents import TRAIN, VALIDATION
from megahybrid.data.mds import index_of, shard_name
from megahybrid.data.units import documents_in
from megahybrid.data.writing import SampleWriter


def assemble(
    blocks: list[Path], units: list[Path], source: Path, seq_length: int, dtype: str, document_id: int
) -> dict[str, int]:
    """Write `source`/train from the blocks' folders and `source`/validation from the units', in their order, and leave
    those as they are; the samples of each split.

    The shards are the blocks' own, linked where the disk can. The tails of the blocks' training text, each as a
    document, make some samples more; the held-out text is cut as a whole.
    """
    shards: list[dict[str, Any]] = []
    for folder in blocks:
        _take(folder / TRAIN, source / TRAIN, shards)
    if len(blocks) > 1:
        tails = source / "tails"
        with SampleWriter(tails, seq_length, dtype) as writer:
            for documents in documents_in(blocks, "rest.bin", dtype, document_id):
                writer.add(documents)
        _take(tails, source / TRAIN, shards)
        shutil.rmtree(tails)
    (source / TRAIN).mkdir(parents=True, exist_ok=True)
    (source / TRAIN / "index.json").write_text(index_of(shards), encoding="utf-8")
    with SampleWriter(source / VALIDATION, seq_length, dtype) as writer:
        for documents in documents_in(units, "validation.bin", dtype, document_id):
            writer.add(documents)
    return {TRAIN: sum(shard["samples"] for shard in shards), VALIDATION: writer.samples}


def _take(folder: Path, target: Path, shards: list[dict[str, Any]]) -> None:
    """Append a folder's shards to those of `target`, numbered on."""
    target.mkdir(parents=True, exist_ok=True)
    for shard in json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]:
        name = shard_name(len(shards))
        _link(folder / shard["raw_data"]["basename"], target / name)
        shards.append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError:  # no hard links on this disk
        shutil.copyfile(file, link)
