"""Micro-batches: samples laid end to end in one row of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megahybrid.data.lengths import lengths_of
from megahybrid_kernels import Sequences


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch of T = samples * seq_length tokens."""

    tokens: Tensor
    """int64 `[T]`."""
    labels: Tensor
    """int64 `[T]`: the next token; at a document's last token, the token that begins the next document."""
    sequences: Sequences
    """Borders at every sample and, with data.document_masking, at every document."""
    samples: Tensor
    """int64 `[T]`: the index, in the split or of a task's row (order.py), of the sample that each token comes from."""
    sample_positions: Tensor
    """int64 `[T]`: each token's position in its sample."""
    weights: Tensor | None = None
    """fp32 `[T]`: what each label weighs in the loss; None where all weigh 1."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device, without waiting for the copies."""
        device = torch.device(device)
        return Batch(
            moved(self.tokens, device),
            moved(self.labels, device),
            replace(self.sequences, cu_seqlens=moved(self.sequences.cu_seqlens, device)),
            moved(self.samples, device),
            moved(self.sample_positions, device),
            None if self.weights is None else moved(self.weights, device),
        )

    def part(self, rank: int, ranks: int) -> Batch:
        """Tokens, labels and weights of one of `ranks` equal parts of the row; the rest stays the whole row's."""
        tokens, labels = self.tokens.chunk(ranks)[rank], self.labels.chunk(ranks)[rank]
        return replace(
            self,
            tokens=tokens,
            labels=labels,
            weights=None if self.weights is None else self.weights.chunk(ranks)[rank],
        )


def pack(
    samples: Sequence[Mapping[str, NDArray]], indices: Sequence[int], document_masking: bool, weighted: bool = False
) -> Batch:
    """Lay samples (`tokens` `[L + 1]`, `borders`, of a task's also `weights` `[L]`) end to end.

    Args:
        samples: all of one length.
        indices: theirs in the split.
        document_masking: whether documents in a sample do not see each other.
        weighted: whether the batch has weights.
    """
    rows = torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))
    length = rows.shape[1] - 1
    lengths = [each for sample in samples for each in lengths_of(sample, length, document_masking)]
    weights = np.stack([sample.get("weights", np.ones(length, np.float32)) for sample in samples]) if weighted else None
    return Batch(
        tokens=rows[:, :-1].reshape(-1),
        labels=rows[:, 1:].reshape(-1),
        sequences=Sequences.of(lengths),
        samples=torch.tensor([int(index) for index in indices]).repeat_interleave(length),
        sample_positions=torch.arange(length).repeat(len(samples)),
        weights=None if weights is None else torch.from_numpy(weights).reshape(-1),
    )


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for the copy."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # only pinned memory is copied without waiting
    return tensor.to(device, non_blocking=True)
