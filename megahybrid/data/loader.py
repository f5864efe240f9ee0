"""What training reads: the micro-batches of each step, and the validation set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megahybrid.config.schema import Config
from megahybrid.data.order import SampleOrder
from megahybrid.data.packing import Batch, pack
from megahybrid.data.prepared import TRAIN, VALIDATION, Prepared, open_prepared
from megahybrid.errors import UserError

if TYPE_CHECKING:
    from megahybrid.data.shards import ShardReader


class TrainingData:
    """One data parallel rank's part of every global batch, from any position.

    Ranks that share `dp_rank` (tensor and pipeline parallel) read the same. Constructing it is collective when
    torch.distributed is initialised.
    """

    def __init__(self, config: Config, dp_rank: int, dp_size: int, consumed: int = 0):
        """`consumed`: samples that all ranks together have read before, the whole resume state.

        Raises UserError if data.path is not prepared for this recipe, is damaged, or does not fill a global batch, and
        if the batch sizes do not divide.
        """
        train = config.train
        if train.global_batch_size % (train.micro_batch_size * dp_size):
            raise UserError(
                f"train.global_batch_size ({train.global_batch_size}) must be a multiple of train.micro_batch_size "
                f"times the data parallel size ({train.micro_batch_size} * {dp_size})."
            )
        self.prepared: Prepared = open_prepared(config)
        self._reader = _open(config, self.prepared, TRAIN)
        self._order = SampleOrder(self._reader.order, self.prepared.samples(TRAIN), train.global_batch_size)
        self._config = config
        self._rank = dp_rank, dp_size
        self.seek(consumed)

    def seek(self, consumed: int) -> None:
        """Go to where `consumed` samples have been read. Raises UserError if that is not a whole number of steps."""
        if consumed % self._config.train.global_batch_size:
            raise UserError(
                f"The run has read {consumed:,} samples, not a multiple of train.global_batch_size "
                f"({self._config.train.global_batch_size}); set it back to what the run began with."
            )
        self._consumed = consumed

    @property
    def consumed(self) -> int:
        """Samples that all ranks together have read."""
        return self._consumed

    @property
    def steps_per_epoch(self) -> int:
        """Global batches before a sample comes again."""
        return self._order.steps_per_epoch

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch. Raises UserError for a damaged shard."""
        global_batch_size = self._config.train.global_batch_size
        indices = self._order.batch(self._consumed // global_batch_size, *self._rank)
        batches = list(_micro_batches(self._reader, indices.tolist(), self._config))
        self._consumed += global_batch_size
        return batches

    def close(self) -> None:
        """Release what the shards hold. Nothing can be read afterwards."""
        self._reader.close()

    def __enter__(self) -> TrainingData:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ValidationData:
    """One rank's part of the validation set, as micro-batches: iterate it as often as needed.

    The set is the first train.validation_samples samples of the validation split, always; each belongs to one rank,
    so ranks may have unequally many (or none). Constructing it is collective when torch.distributed is initialised.
    """

    def __init__(self, config: Config, dp_rank: int, dp_size: int):
        """Raises UserError if data.path is not prepared for this recipe or is damaged."""
        prepared = open_prepared(config)
        self.samples = min(config.train.validation_samples, prepared.samples(VALIDATION))
        """Over all ranks."""
        self._indices = range(self.samples)[dp_rank::dp_size]
        self._reader = _open(config, prepared, VALIDATION) if self.samples else None
        self._config = config

    def __len__(self) -> int:
        """Micro-batches of this rank; the last may hold fewer samples than the others."""
        return -(-len(self._indices) // self._config.train.micro_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._reader is not None:
            yield from _micro_batches(self._reader, self._indices, self._config)

    def close(self) -> None:
        """Release what the shards hold. Nothing can be read afterwards."""
        if self._reader is not None:
            self._reader.close()

    def __enter__(self) -> ValidationData:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def validation_batches(config: Config, dp_rank: int, dp_size: int) -> ValidationData:
    """The micro-batches that this rank validates on; see ValidationData."""
    return ValidationData(config, dp_rank, dp_size)


def _open(config: Config, prepared: Prepared, split: str) -> ShardReader:
    from megahybrid.data.shards import ShardReader  # takes seconds, and only readers need it

    return ShardReader(prepared, split, config.train.seed, config.data.shuffle_block_size)


def _micro_batches(reader: ShardReader, indices: Sequence[int], config: Config) -> Iterator[Batch]:
    size = config.train.micro_batch_size
    for begin in range(0, len(indices), size):
        part = indices[begin : begin + size]
        yield pack([reader[index] for index in part], part, config.data.document_masking)
