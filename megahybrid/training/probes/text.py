"""Probes on held-out text: loss by position, by what the context holds beyond the window, and of repeated bigrams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megahybrid.config.evaluation import evaluation_window
from megahybrid.config.schema import Config
from megahybrid.data.packing import Batch
from megahybrid.parallel import groups
from megahybrid.training.engine import Engine
from megahybrid.training.probes import names
from megahybrid.training.probes.rows import Row, filled, means, passed, rounded


class TextProbes:
    """position, gain and hits, as far as asked for, from this replica's validation batches."""

    def __init__(self, config: Config, batches: Sequence[Batch]):
        self._asked, window, length = config.evaluate.probes, evaluation_window(config), config.train.seq_length
        self._sizes = {"position": (length - 1).bit_length() + 1, "hits": 4, "gain": 2}
        self._rows = [Row(batch) for batch in batches]
        self._bins = [self._bins_of(batch, window) for batch in batches]
        if "gain" in self._asked:
            cut = [piece for batch in batches for piece in cut_documents(batch, window)]
            for _, batch in filled(cut, config.train):
                self._rows.append(Row(batch))  # what fills it up has a loss of 0
                self._bins.append({"gain": torch.where(batch.sequences.offsets >= window, 1, -1)})

    def _bins_of(self, batch: Batch, window: int) -> dict[str, Tensor]:
        """By probe, int64 `[T]`: where a token's loss counts, -1 for nowhere."""
        bins = {
            "position": log_bins(batch.sequences.offsets),
            "hits": hit_bins(hit_distances(batch), window),
            "gain": torch.where(batch.sequences.offsets >= 2 * window, 0, -1),
        }
        return {name: each for name, each in bins.items() if name in self._asked}

    def run(self, engine: Engine) -> dict[str, Any]:
        """Metrics; the same on all processes."""
        sums = {name: torch.zeros(2, size, dtype=torch.float64) for name, size in self._sizes.items()}
        for bins, found in zip(self._bins, passed(engine, self._rows), strict=True):
            for name, each in bins.items() if found.losses is not None else ():
                for total, weights in zip(sums[name], (found.losses, None), strict=True):
                    total += torch.bincount(each + 1, weights, minlength=len(total) + 1)[1:]
        flat = groups.sum_over_all(torch.cat(list(sums.values()), 1).to(engine.device)).cpu()
        parts = flat.split(list(self._sizes.values()), 1)
        return self._metrics({name: part.numpy() for name, part in zip(sums, parts, strict=True)})

    def _metrics(self, sums: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        if "position" in self._asked:
            metrics[names.POSITION] = means(*sums["position"])
        if "hits" in self._asked:
            *hits, others = means(*sums["hits"])
            metrics |= {names.HITS: hits, names.OTHERS: others}
        if "gain" in self._asked:
            nats, tokens = sums["gain"]
            metrics[names.GAIN] = rounded((nats[1] - nats[0]) / tokens[0]) if tokens[0] else None
        return metrics


def log_bins(positions: Tensor) -> Tensor:
    """0 for position 0, n for those from 2^(n - 1) to 2^n - 1."""
    return torch.frexp(positions.double()).exponent.long()


def hit_distances(batch: Batch) -> Tensor:
    """Of each label, int64 `[T]`: how many tokens ago it last followed the same token in this document; 0 for never."""
    index, tokens, labels = (each.numpy() for each in (batch.sequences.index, batch.tokens, batch.labels))
    bigrams = (index * 2**21 + tokens) * 2**21 + labels
    order = np.argsort(bigrams, kind="stable")
    again = bigrams[order[1:]] == bigrams[order[:-1]]
    distances = np.zeros(len(order), np.int64)
    distances[order[1:][again]] = np.diff(order)[again]
    return torch.from_numpy(distances)


def hit_bins(distances: Tensor, window: int) -> Tensor:
    """0 up to the window, 1 up to four times as far, 2 beyond; 3 for distance 0, which is none."""
    return torch.where(distances == 0, 3, (distances > window).long() + (distances > 4 * window))


def cut_documents(batch: Batch, window: int) -> Iterator[Tensor]:
    """Pieces of `2 * window` tokens at stride `window`, int64 `[2, n]` with tokens and labels, whose second half has
    lost a part of what its document says before it: but for a document's first one. The last may be shorter."""
    both = torch.stack([batch.tokens, batch.labels])
    for begin, end in pairwise(batch.sequences.borders):
        for first in range(begin + window, end - window, window):
            yield both[:, first : min(first + 2 * window, end)]
