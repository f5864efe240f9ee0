"""What training reads: the micro-batches of each step, and the validation set."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import distributed as dist

from megahybrid.config.schema import Config
from megahybrid.config.validate import check_replicas
from megahybrid.data.documents import TRAIN, VALIDATION
from megahybrid.data.opened import open_data, text_weights
from megahybrid.data.order import ENDLESS, OrderedSource, SampleOrder, apportion
from megahybrid.data.packing import Batch, pack
from megahybrid.data.prepared import open_store
from megahybrid.data.shards import ShardReader
from megahybrid.data.task_rows import TaskRows
from megahybrid.errors import MachineFault, UserError


class TrainingData:
    """One data parallel rank's part of every global batch, from any position.

    Ranks that share `dp_rank` (tensor, context and pipeline parallel) read the same. The order (order.py) knows no
    ranks and no steps: its state is the number of samples consumed. Constructing it is collective when
    torch.distributed is initialised: what one rank finds wrong is raised on all.
    """

    def __init__(self, config: Config, dp_rank: int, dp_size: int, consumed: int = 0):
        """`consumed`: samples that all ranks together have read before, the whole resume state.

        Raises UserError if data.path is not prepared for this recipe, is damaged, or does not fill a global batch, if
        the batch sizes do not divide, and if ranks find different data.
        """
        self._config = config
        self._rank = dp_rank, dp_size
        _on_all_ranks(self._open)
        self.seek(consumed)

    def _open(self) -> str:
        config, dp_size = self._config, self._rank[1]
        train = config.train
        check_replicas(config, dp_size)
        self.opened = open_data(config)
        """What the sources are."""
        self._rows = TaskRows(config, self.opened.vocabulary)
        weights = text_weights(config, self.opened.prepared)
        self._reader = ShardReader(self.opened.prepared, open_store(config), TRAIN, weights, train.seq_length)
        samples = self._reader.shard_samples
        sources = [OrderedSource(name, samples[name], weight) for name, weight in weights.items()]
        sources += [OrderedSource(name, np.empty(0, np.int64), weight) for name, weight in self._rows.weights.items()]
        self._order = SampleOrder(sources, train.seed, config.data.shuffle_block_size)
        if rare := [each.name for each, count in zip(sources, self._order.counts, strict=True) if count == 0]:
            raise UserError(
                f"data.sources.{rare[0]}.weight is so small that {self.samples_per_epoch:,} samples have none of it; "
                "raise it, or set it to 0."
            )
        if weights and self.samples_per_epoch < train.global_batch_size:
            raise UserError(
                f"The prepared text holds {self.samples_per_epoch:,} samples, fewer than train.global_batch_size "
                f"({train.global_batch_size:,}); add text or lower it."
            )
        self._require_cache(weights)
        return self.opened.identity

    def seek(self, consumed: int) -> None:
        """Go to where `consumed` samples have been read. Raises UserError if that is not a whole number of steps."""
        if consumed % self._config.train.global_batch_size:
            raise UserError(
                f"The run has read {consumed:,} samples, not a multiple of train.global_batch_size "
                f"({self._config.train.global_batch_size}); set it back to what the run began with."
            )
        self._consumed = consumed
        self._prepared: Future[list[Batch]] | None = None
        self.seconds = 0.0
        """That reading and packing what `next_step` gave took, here or in `prepare`."""
        self._ahead: tuple[int, int] | None = None
        self._look_ahead()

    @property
    def consumed(self) -> int:
        """Samples that all ranks together have read."""
        return self._consumed

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the sources in use; consumed // samples_per_epoch is the epoch, in the sense of order.py."""
        return self._order.samples_per_epoch

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch. Raises UserError for a damaged shard."""
        self.prepare()
        prepared, self._prepared = self._prepared, None
        batches = prepared.result()
        self._consumed += self._config.train.global_batch_size
        return batches

    def prepare(self) -> None:
        """Make what `next_step` gives next, while a GPU computes, say. What goes wrong is raised there."""
        if self._prepared is not None:
            return
        prepared, began = Future[list[Batch]](), time.perf_counter()
        try:
            prepared.set_result(self._make())
        except Exception as error:
            prepared.set_exception(error)
        self._prepared, self.seconds = prepared, time.perf_counter() - began

    def _make(self) -> list[Batch]:
        train, size = self._config.train, self._rank[1]
        self._look_ahead()
        indices = self._indices(self._consumed)
        batches = list(_micro_batches(self._sample, indices, self._config, bool(self._rows.weights)))
        read = sum(len(batch.tokens) for batch in batches)
        if read * size != train.global_batch_size * train.seq_length:
            raise RuntimeError(f"read {read} tokens of a global batch of {train.global_batch_size} samples")
        following = self._indices(self._consumed + train.global_batch_size)
        self._rows.look_ahead([index for index in following if index >= ENDLESS])
        return batches

    def _indices(self, consumed: int) -> list[int]:
        """Of this rank's samples of the global batch behind `consumed` samples."""
        rank, size = self._rank
        return self._order.indices(consumed, self._config.train.global_batch_size)[rank::size].tolist()

    def _sample(self, index: int) -> Mapping[str, NDArray]:
        return self._reader[index] if index < ENDLESS else self._rows[index]

    def close(self) -> None:
        """End the threads and the process that work ahead. Nothing can be read afterwards."""
        self._reader.close()
        self._rows.close()

    def __enter__(self) -> TrainingData:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _look_ahead(self) -> None:
        """Have the shards made ready that this step's blocks and the next one's need."""
        blocks = list(self._order.blocks(self._consumed, self._config.train.global_batch_size))
        if blocks[-1] != self._ahead:
            self._ahead = blocks[-1]
            blocks.append(self._order.following(*blocks[-1]))
            self._reader.look_ahead(shard for block in blocks for shard in self._order.shards(*block))

    def _require_cache(self, weights: dict[str, float]) -> None:
        """Refuse a cache that cannot hold the shards in use at once: every step would fetch them again."""
        limit = self._config.data.cache_limit
        if self._config.data.remote is None or limit is None:
            return
        needed, first = 0, 0
        blocks = 2 + self._config.train.global_batch_size // self._config.data.shuffle_block_size
        for number, samples in enumerate(self._reader.shard_samples.values()):
            sizes = [shard.file.bytes for shard in self._reader.shards[first : first + len(samples)]]
            first += len(samples)
            a_sample = max(size / count for size, count in zip(sizes, samples.tolist(), strict=True))
            span = blocks * self._order.largest_share(number) * a_sample + 2 * max(sizes)
            needed += min(int(span), sum(sizes))
        if limit * 1e9 < needed:
            raise UserError(
                f"data.cache_limit is {limit:g} GB, but the shards in use at once take {needed / 1e9:.3g} GB; raise it "
                "or lower data.shuffle_block_size."
            )


class ValidationData:
    """One rank's part of the validation set, as micro-batches: iterate it as often as needed.

    The set is train.validation_samples samples of the validation split, always the same: the first ones of every
    source in use, of each as many as its share of the split. Each belongs to one rank, so ranks may have unequally
    many (or none). Constructing it is collective when torch.distributed is initialised.
    """

    def __init__(self, config: Config, dp_rank: int, dp_size: int):
        """Raises UserError if data.path is not prepared for this recipe or is damaged."""
        self._config = config
        _on_all_ranks(self._open)
        self._indices = self._set[dp_rank::dp_size]

    def _open(self) -> str:
        opened = open_data(self._config)
        prepared = opened.prepared
        held = prepared.sources_of(VALIDATION) if prepared else {}
        sources = [name for name in text_weights(self._config, prepared) if name in held]
        length = self._config.train.seq_length
        self._reader = ShardReader(prepared, open_store(self._config), VALIDATION, sources, length)
        sizes = [int(samples.sum()) for samples in self._reader.shard_samples.values()]
        self.samples = min(self._config.train.validation_samples, sum(sizes))
        """Over all ranks."""
        self.ends = dict(zip(sources, accumulate(sizes), strict=True))
        """Of each source, by name, the index after its last sample in the split."""
        shares = apportion(self.samples, sizes) if sizes else []
        self.unread = [name for name, count in zip(sources, shares, strict=True) if not count]
        """Sources whose share of the set is less than a sample."""
        first, self._set = 0, []
        for size, count in zip(sizes, shares, strict=True):
            self._set += range(first, first + count)
            first += size
        return opened.identity

    def __len__(self) -> int:
        """Micro-batches of this rank; the last may hold fewer samples than the others."""
        return -(-len(self._indices) // self._config.train.micro_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self._reader.look_ahead(self._reader.shards_of(self._indices))
        yield from _micro_batches(self._reader.__getitem__, self._indices, self._config)

    def close(self) -> None:
        """End the background threads. Nothing can be read afterwards."""
        self._reader.close()

    def __enter__(self) -> ValidationData:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def validation_batches(config: Config, dp_rank: int, dp_size: int) -> ValidationData:
    """The micro-batches that this rank validates on; see ValidationData."""
    return ValidationData(config, dp_rank, dp_size)


def _micro_batches(
    read: Callable[[int], Mapping[str, NDArray]], indices: Sequence[int], config: Config, weighted: bool = False
) -> Iterator[Batch]:
    size = config.train.micro_batch_size
    for begin in range(0, len(indices), size):
        part = indices[begin : begin + size]
        yield pack([read(index) for index in part], part, config.data.document_masking, weighted)


def _on_all_ranks(open_data: Callable[[], str]) -> None:
    """Open data on every rank; if that fails on one, or ranks find different data, raise on all."""
    error, identity = None, ""
    try:
        identity = open_data()
    except Exception as caught:
        error = caught
    if dist.is_available() and dist.is_initialized():
        found: list[Any] = [None] * dist.get_world_size()
        mine = f"{error}" if error else "", isinstance(error, MachineFault), identity, socket.gethostname()
        dist.all_gather_object(found, mine)
        if (error is None or isinstance(error, UserError)) and (fault := _fault(found)):
            raise fault from error
    if error is not None:
        raise error


def _fault(found: Sequence[tuple[str, bool, str, str]]) -> UserError | None:
    """What is wrong, by the ranks' messages, whether these tell of the machine, the data's identities and hosts."""
    hosts = {host for *_, host in found}
    if faults := [each for each in found if each[0]]:
        (message, machine, _, _), with_fault = faults[0], {host for *_, host in faults}
        if with_fault != hosts:
            message = f"{message.rstrip('.')} (on {', '.join(sorted(with_fault))} only; all nodes need the same data)."
        return (MachineFault if machine else UserError)(message)
    nodes = {identity: host for _, _, identity, host in reversed(found)}
    if len(nodes) > 1:
        where = ", ".join(f"{identity} on {host}" for identity, host in nodes.items())
        return UserError(f"The nodes do not find the same prepared data ({where}); give all of them the same copy.")
    return None
