"""Micro-batches: samples laid end to end in one row of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megahybrid.data.lengths import lengths_of
from megahybrid_kernels import Sequences

_ALIGNMENT = 512  # bytes


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
        """The same on a device, without waiting for the copy."""
        every = [self.tokens, self.labels, self.sequences.cu_seqlens, self.samples, self.sample_positions]
        weights = [] if self.weights is None else [self.weights]
        tokens, labels, cu_seqlens, samples, positions, *weights = moved_together(every + weights, torch.device(device))
        sequences = replace(self.sequences, cu_seqlens=cu_seqlens)
        return Batch(tokens, labels, sequences, samples, positions, weights[0] if weights else None)

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


def moved_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on a device, in one copy, which is not waited for."""
    if device.type != "cuda" or tensors[0].is_cuda:
        return [tensor.to(device) for tensor in tensors]
    row = torch.empty(_places(tensors)[-1], dtype=torch.uint8, pin_memory=True)
    for there, tensor in zip(views(row, tensors), tensors, strict=True):
        there.copy_(tensor)
    return views(row.to(device, non_blocking=True), tensors)


def views(row: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The places of tensors like these in a row of bytes."""
    parts = zip(tensors, _places(tensors), strict=False)
    return [row[begin : begin + like.nbytes].view(like.dtype).view(like.shape) for like, begin in parts]


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where each begins, as far apart as an allocator would have them, and the end."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    return [0, *accumulate(sizes)]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for the copy."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # only pinned memory is copied without waiting
    return tensor.to(device, non_blocking=True)
