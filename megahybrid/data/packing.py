"""Micro-batches: samples laid end to end in one row of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    """int64 `[T]`: the index, in the split, of the sample that each token comes from."""
    sample_positions: Tensor
    """int64 `[T]`: each token's position in its sample."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device, without waiting for the copies."""
        device = torch.device(device)
        return Batch(
            _move(self.tokens, device),
            _move(self.labels, device),
            replace(self.sequences, cu_seqlens=_move(self.sequences.cu_seqlens, device)),
            _move(self.samples, device),
            _move(self.sample_positions, device),
        )


def pack(samples: Sequence[Mapping[str, NDArray]], indices: Sequence[int], document_masking: bool) -> Batch:
    """Lay stored samples (`tokens` `[L + 1]`, `borders`) end to end; `indices` are theirs in the split."""
    rows = torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))
    length = rows.shape[1] - 1
    lengths: list[int] = []
    for sample in samples:
        borders = sample["borders"].tolist() if document_masking else [0]
        lengths += (end - begin for begin, end in pairwise([*borders, length]))
    return Batch(
        tokens=rows[:, :-1].reshape(-1),
        labels=rows[:, 1:].reshape(-1),
        sequences=Sequences.of(lengths),
        samples=torch.tensor([int(index) for index in indices]).repeat_interleave(length),
        sample_positions=torch.arange(length).repeat(len(samples)),
    )


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # only pinned memory is copied without waiting
    return tensor.to(device, non_blocking=True)
