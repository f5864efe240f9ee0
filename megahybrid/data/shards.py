"""Reading MDS shards by index, safely. Importing this takes seconds (mosaicml-streaming): do it inside a function.

mosaicml-streaming stores and caches; the order is ours (order.py). Left alone, it answers a missing or corrupt shard
with a silent end or a hang, so every file is compared with its index before anything is read from it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import secrets
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import streaming.base.shared.prefix as shared_prefix
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.hashing import get_hash
from streaming.base.world import World
from torch import distributed as dist

from megahybrid.data.prepared import Prepared
from megahybrid.errors import UserError

# How many separate paths through the shards an epoch interleaves. Part of the order: never change it.
_CANONICAL_NODES = 8
_PREFIXES = 10**9


class ShardReader(StreamingDataset):
    """The samples of one split over all sources, sources in the order of their names: `reader[i]` → columns.

    Constructing it is collective when torch.distributed is initialised. Raises UserError, naming the file, for any
    fault of the shards.
    """

    def __init__(self, prepared: Prepared, split: str, seed: int, shuffle_block_size: int):
        sources = prepared.sources_of(split)
        for source, samples in sources.items():
            _check_files(prepared.root / source / split, samples)
        with _real_world():
            super().__init__(
                streams=[Stream(local=str(prepared.root / source), split=split) for source in sources],
                batch_size=1,  # the order does not depend on it
                shuffle=True,
                shuffle_algo="py1e",
                shuffle_seed=seed,
                shuffle_block_size=shuffle_block_size,
                num_canonical_nodes=min(_CANONICAL_NODES, sum(sources.values())),
            )
        self._whole: set[int] = set()

    def order(self, epoch: int) -> NDArray[np.int64]:
        """All sample indices, each once, in the order of this epoch; the same on every layout."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that shards larger than the block are shuffled by themselves
            order = generate_work("random", self, World(1, 1, 1, 0), epoch, 0).reshape(-1)
        # Canonical nodes hold equally many samples only because short ones repeat their last: drop the repeats.
        nodes = self.num_canonical_nodes
        borders = np.arange(nodes + 1) * self.epoch_size // nodes
        short = np.diff(borders) < -(-self.epoch_size // nodes)
        return np.concatenate([order[:-nodes], order[-nodes:][~short]])

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """One sample; its shard's hash is verified when this process first reads from it."""
        shard_id, _ = self.spanner[sample_id]
        if shard_id not in self._whole:
            self._verify(shard_id)
            self._whole.add(shard_id)
        try:
            return super().get_item(sample_id, retry)
        except UserError:
            raise
        except Exception as error:
            raise UserError(_damaged(self._file(shard_id), f"cannot be read ({error})")) from error

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Called by streaming for a shard that is not there; nothing can bring back a local one."""
        raise UserError(_damaged(self._file(shard_id), "is missing"))

    def close(self) -> None:
        """Release the shared memory. Nothing can be read afterwards."""
        for memory in (
            self._locals_shm,
            self._shared_barrier._arr.shm,
            self._next_epoch.arr.shm,
            self._cache_usage.arr.shm,
            self._shard_states.shm,
            self._shard_access_times.shm,
        ):
            memory.cleanup()
            atexit.unregister(memory.cleanup)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half-constructed, or closed before
            self.close()

    def _file(self, shard_id: int) -> Path:
        shard = self.shards[shard_id]
        return Path(shard.dirname, shard.split, shard.raw_data.basename)

    def _verify(self, shard_id: int) -> None:
        file, info = self._file(shard_id), self.shards[shard_id].raw_data
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(_damaged(file, f"cannot be read ({error.strerror})")) from error
        if len(data) != info.bytes:
            raise UserError(_damaged(file, f"has {len(data)} bytes, not {info.bytes}"))
        for algorithm, expected in info.hashes.items():
            if get_hash(algorithm, data) != expected:
                raise UserError(_damaged(file, f"does not match its {algorithm} hash"))


def _check_files(folder: Path, samples: int) -> None:
    """Compare the index with dataset.json and every shard's size with the index."""
    index = folder / "index.json"
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["shards"]
        found = sum(shard["samples"] for shard in shards)
        files = [(folder / shard["raw_data"]["basename"], shard["raw_data"]) for shard in shards]
        expected = [(file, info["bytes"], info["hashes"]) for file, info in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_damaged(index, "is missing or unreadable")) from error
    if found != samples:
        raise UserError(_damaged(index, f"lists {found} samples, not {samples}"))
    for file, size, hashes in expected:
        if not hashes:
            raise UserError(_damaged(index, f"has no hash of {file.name}"))
        try:
            actual = file.stat().st_size
        except OSError as error:
            raise UserError(_damaged(file, "is missing")) from error
        if actual != size:
            raise UserError(_damaged(file, f"has {actual} bytes, not {size}"))


def _damaged(file: Path, fault: str) -> str:
    return f"'{file}' {fault}; remove the data folder and run `megahybrid prepare` again."


@contextlib.contextmanager
def _real_world() -> Iterator[None]:
    """Give streaming the processes as torch.distributed has them, and a shared memory prefix of this dataset's own.

    Streaming reads the environment, which says nothing when the group was made without it, and it takes the first
    prefix that is free, for which two jobs on a host race and where a killed job's leavings stand.
    """
    layout, prefix = _layout()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    search = shared_prefix._each_prefix_int
    os.environ.update(zip(names, map(str, layout), strict=True))
    shared_prefix._each_prefix_int = lambda: itertools.count(prefix)
    try:
        yield
    finally:
        shared_prefix._each_prefix_int = search
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _layout() -> tuple[tuple[int, int, int, int], int]:
    """(rank, world size, local rank, local world size), and a prefix that all processes agree on."""
    prefix = secrets.randbelow(_PREFIXES)
    if not (dist.is_available() and dist.is_initialized()):
        return (0, 1, 0, 1), prefix
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, (socket.gethostname(), prefix))
    hosts = [host for host, _ in everyone]
    local = hosts.count(hosts[0])
    if hosts != [hosts[i - i % local] for i in range(size)] or len(set(hosts)) * local != size:
        raise UserError("Every host must run equally many processes, of consecutive ranks; change the launch command.")
    return (rank, size, rank % local, local), everyone[0][1]
