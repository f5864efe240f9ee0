"""Micro-batches of whole documents, and one pass of the model over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megahybrid.config.schema import TrainConfig
from megahybrid.data.packing import Batch
from megahybrid.model.context import Context, Watch
from megahybrid.model.stack import Stack, StackOutput
from megahybrid.parallel import groups
from megahybrid.parallel.heads import gather_tokens
from megahybrid.training.engine import Engine
from megahybrid_kernels import Sequences
from megahybrid_kernels.linear_cross_entropy import IGNORED


@dataclass(frozen=True, eq=False)
class Row:
    """A micro-batch of T tokens, on the host.

    Attributes:
        batch: what goes through the model.
        asked: int64 `[places]`, where the most likely next token is wanted; None for nowhere.
        watch: the pairs of which is asked whether they are seen, or None.
    """

    batch: Batch
    asked: Tensor | None = None
    watch: Watch | None = None

    @property
    def tokens(self) -> Tensor:
        """int64 `[T]`."""
        return self.batch.tokens


class Found(NamedTuple):
    """What a pass over one row gave on this process, on the host.

    Attributes:
        losses: float64 `[T]`, nats; None but on the first of the ranks that split heads, of the last stage.
        likeliest: int64 `[places]`, likewise.
        seen: bool `[pairs, heads of this rank]` by layer of this process.
    """

    losses: Tensor | None
    likeliest: Tensor | None
    seen: dict[int, Tensor]


def filled(documents: Sequence[Tensor], train: TrainConfig) -> Iterator[tuple[list[int], Batch]]:
    """Documents, int64 `[2, n]` with tokens and labels, in the order of their numbers, as many to a row as fit into a
    micro-batch; each row with their numbers. It is filled up to a multiple of train.seq_length, with labels that do not
    count. No document may be longer than a micro-batch.
    """
    most, numbers, size = train.micro_batch_size * train.seq_length, [], 0
    for number, document in enumerate(documents):
        if size + document.shape[1] > most:
            yield numbers, _row([documents[each] for each in numbers], train.seq_length)
            numbers, size = [], 0
        numbers.append(number)
        size += document.shape[1]
    if numbers:
        yield numbers, _row([documents[each] for each in numbers], train.seq_length)


def _row(documents: list[Tensor], unit: int) -> Batch:
    if rest := -sum(document.shape[1] for document in documents) % unit:
        documents = [*documents, torch.tensor([[0], [IGNORED]]).expand(-1, rest)]
    tokens, labels = torch.cat(documents, 1)
    zeros = torch.zeros_like(tokens)
    return Batch(tokens, labels, Sequences.of([document.shape[1] for document in documents]), zeros, zeros)


def passed(engine: Engine, rows: Sequence[Row]) -> list[Found]:
    """All rows through the model, by the rules of inference, on any layout: a collective of all processes."""
    found = {row: Found(None, None, {}) for row in rows}

    def forward(stage: Stack, row: Row) -> StackOutput:
        batch = row.batch.part(*groups.context_parallel()).to(engine.device)
        asked = None if row.asked is None else row.asked.to(engine.device)
        watch = None if row.watch is None else Watch(*(each.to(engine.device) for each in row.watch))
        out = stage(batch.tokens, Context(batch.sequences, watch=watch), labels=batch.labels, asked=asked)
        found[row].seen.update({layer: aux.seen for layer, aux in out.aux.items()})
        if out.losses is not None:
            losses = gather_tokens(out.losses)
            if groups.head_parallel()[0] == 0:
                found[row] = found[row]._replace(losses=losses, likeliest=out.likeliest)
        return out

    engine.look(rows, forward)
    return [_on_host(each) for each in found.values()]


def _on_host(found: Found) -> Found:
    losses, likeliest, seen = found
    return Found(
        None if losses is None else losses.double().cpu(),
        None if likeliest is None else likeliest.cpu(),
        {layer: each.cpu() for layer, each in seen.items()},
    )


def rounded(value: float) -> float:
    """To the six digits that a metric needs."""
    return float(f"{value:.6g}")


def means(totals: NDArray[np.float64], counts: NDArray[np.float64]) -> list[float | None]:
    """Of each; None where there is nothing."""
    pairs = zip(totals.tolist(), counts.tolist(), strict=True)
    return [rounded(total / count) if count else None for total, count in pairs]
