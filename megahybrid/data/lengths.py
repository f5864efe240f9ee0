"""How long the sequences are that a recipe's samples are cut into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megahybrid.config.schema import Config
from megahybrid.config.task_sources import text_sources
from megahybrid.data.documents import TRAIN
from megahybrid.data.opened import open_data, text_weights
from megahybrid.data.order import ENDLESS, apportion
from megahybrid.data.prepared import find_prepared, open_store
from megahybrid.data.shards import ShardReader
from megahybrid.data.task_rows import TaskRows

# Read of all sources together, and from how many shards of each at most.
_SAMPLES = 1024
_SHARDS = 8
# Groups of sequences of about the same length, of about as many tokens each.
_GROUPS = 64

_known: dict[tuple[str, str, int], dict[int, float]] = {}


def sequence_lengths(config: Config) -> Mapping[int, float] | None:
    """Which part of the tokens of a recipe is in sequences of which length; None where its data are not prepared yet,
    or at a URL, from which nothing is fetched for this.

    Counted in samples of all sources, always the same ones. Sequences of about the same length L count as one of
    E[L²] / E[L], of which their tokens see as much on average. Raises UserError for data that do not fit.
    """
    data, length = config.data, config.train.seq_length
    if data.remote is not None:
        return None
    if (text_sources(config) or not data.sources) and find_prepared(Path(str(data.path)).expanduser()) is None:
        return None
    opened = open_data(config)
    key = opened.identity, repr(data), length
    if key not in _known:
        weights = text_weights(config, opened.prepared)
        reader = ShardReader(opened.prepared, open_store(config), TRAIN, weights, length)
        with contextlib.closing(reader), contextlib.closing(TaskRows(config, opened.vocabulary)) as rows:
            parts = weights | rows.weights
            counts = apportion(_SAMPLES, list(parts.values()))
            indices = _indices([*reader.shard_samples.values()], counts)
            samples = [reader[index] if index < ENDLESS else rows[index] for index in indices]
        found = [each for sample in samples for each in lengths_of(sample, length, data.document_masking)]
        _known[key] = _grouped(np.array(found))
    return _known[key]


def _indices(shards: Sequence[NDArray[np.int64]], counts: Sequence[int]) -> Iterator[int]:
    """Samples of each source, the more often the larger its weight: of text, whose shards hold so many samples each,
    evenly from all over it, since files may stand by their size; of tasks the first ones."""
    first = 0
    for samples, count in zip(shards, counts, strict=False):
        starts = first + np.concatenate([[0], np.cumsum(samples)])
        chosen = np.unique(np.linspace(0, len(samples) - 1, _SHARDS).round().astype(int))
        for shard, share in zip(chosen, apportion(count, [1.0] * len(chosen)), strict=True):
            yield from (int(starts[shard] + number * samples[shard] // share) for number in range(share))
        first = starts[-1]
    for number, count in enumerate(counts[len(shards) :]):
        yield from (ENDLESS * (number + 1) + row for row in range(count))


def _grouped(lengths: NDArray[np.int64]) -> dict[int, float]:
    lengths = np.sort(lengths)
    group = (np.cumsum(lengths) - 1) * _GROUPS // lengths.sum()
    tokens, squares = np.bincount(group, lengths), np.bincount(group, lengths.astype(float) ** 2)
    found: dict[int, float] = {}
    for count, square in zip(tokens[tokens > 0], squares[tokens > 0], strict=True):
        mean = round(square / count)
        found[mean] = found.get(mean, 0.0) + float(count / lengths.sum())
    return found


def lengths_of(sample: Mapping[str, NDArray], length: int, document_masking: bool) -> list[int]:
    """Of the sequences of a sample of `length` tokens. The borders of those with weights hold without document masking,
    too."""
    borders = sample["borders"].tolist() if document_masking or "weights" in sample else [0]
    return [end - begin for begin, end in pairwise([*borders, length])]
