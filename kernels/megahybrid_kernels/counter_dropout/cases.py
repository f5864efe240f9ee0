"""How dropout's keys are judged: against the hash in Python's integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Shape, packed
from megahybrid_kernels.sequences import Sequences

_FIRST_SAMPLE = 2**40 - 3


@dataclass(frozen=True)
class DropoutKeys(Shape):
    """Of so many layers, in a step of a run."""

    layers: int
    seed: int = 2**33 + 5
    step: int = 1_000_003

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents, each a sample."""

        def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
            samples = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) + _FIRST_SAMPLE
            return {"samples": samples, "positions": torch.cat([torch.arange(length) for length in lengths])}

        return [
            Case(
                "dropout_keys",
                "counter_dropout",
                "dropout_keys",
                f"{packed(lengths)} layers={self.layers}",
                lengths,
                make,
                lambda op, x, sequences: op(x["samples"], x["positions"], self.seed, self.step, self.layers),
                backward=False,
                judge=self._wrong,
            )
        ]

    def _wrong(self, keys: Tensor, x: Inputs, sequences: Sequences) -> float:
        """Share of keys that are not the hash."""
        tokens = list(zip(x["samples"].tolist(), x["positions"].tolist(), strict=True))
        begun = [_hash(_hash(_hash(sample, self.seed), self.step), position) for sample, position in tokens]
        expected = torch.tensor([[_hash(key, layer) for key in begun] for layer in range(self.layers)])
        return (keys.cpu() != expected).double().mean().item()


def _hash(*values: int) -> int:
    state = 0x9E3779B9
    for value in values:
        for half, factor in ((value, 0x9E3779B9), (value >> 32, 0x846CA68B)):
            state ^= half % 2**32 * factor % 2**32
            state = (state ^ (state >> 16)) * 0x7FEB352D % 2**32
            state = (state ^ (state >> 15)) * 0x846CA68B % 2**32
            state ^= state >> 16
    return state
