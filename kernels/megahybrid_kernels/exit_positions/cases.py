"""How exit positions are judged: against a buffer that is played token by token."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Shape, packed
from megahybrid_kernels.sequences import Sequences

_KEPT = 0.3
# More than a group of candidates that is sorted.
_LONG = (4400, 300)


@dataclass(frozen=True)
class ExitPositions(Shape):
    """near_window, near_buffer: in place of the others in short documents."""

    heads: int
    window: int = 768
    buffer: int = 512
    sinks: int = 4
    near_window: int = 95
    near_buffer: int = 64

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        return [replace(self, window=self.near_window, buffer=self.near_buffer)._whole(lengths)]

    def more_cases(self, lengths: Lengths, varied: bool) -> list[Case]:
        """Long documents, of a few heads, as the buffer is played by hand."""
        return [replace(self, heads=min(self.heads, 2))._whole(_LONG, "long")]

    def _whole(self, lengths: Lengths, variant: str = "") -> Case:
        def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
            return {"score": torch.rand((sum(lengths), self.heads), generator=generator) - (1 - _KEPT)}

        return Case(
            "exit_positions",
            "exit_positions",
            "exit_positions",
            f"{packed(lengths)} heads={self.heads} kept={_KEPT} window={self.window} buffer={self.buffer}",
            lengths,
            make,
            lambda op, x, sequences: op(x["score"], sequences, self.window, self.sinks, self.buffer),
            backward=False,
            judge=lambda exits, x, sequences: self._wrong(exits, x["score"], sequences),
            variant=variant,
        )

    def _wrong(self, exits: Tensor, score: Tensor, sequences: Sequences) -> float:
        """Share of tokens that a buffer, played token by token, drops at another query than `exits` says."""
        expected = torch.cat([self._played(part.tolist()) for part in score.cpu().split(sequences.lengths)])
        lengths = torch.tensor(sequences.lengths).repeat_interleave(torch.tensor(sequences.lengths))[:, None]
        positions = torch.cat([torch.arange(length) for length in sequences.lengths])[:, None]

        def seen(exits: Tensor) -> Tensor:
            # What queries can tell apart: no exit after the last of them, and none before the token leaves the window.
            exits = exits.minimum(lengths)
            return exits.where(exits > positions + self.window + 1, 0)

        return (seen(exits.cpu()) != seen(expected)).double().mean().item()

    def _played(self, score: list[list[float]]) -> Tensor:
        """int64 `[tokens, heads]`: the exit of each token of one document, 0 for those that the buffer never holds."""
        tokens, heads = len(score), len(score[0])
        exits = torch.zeros(tokens, heads, dtype=torch.int64)
        for head in range(heads):
            held: list[tuple[bool, float, int]] = []  # a heap, the first to go on top: lowest score, then youngest
            for token in range(tokens):
                sink = token < self.sinks
                if not sink and score[token][head] <= 0:
                    continue
                rank = (sink, 0.0 if sink else score[token][head], -token)
                if len(held) == self.buffer:
                    out = heapq.heappushpop(held, rank)
                    if out == rank:
                        continue
                    exits[-out[2], head] = token + self.window + 1
                else:
                    heapq.heappush(held, rank)
                exits[token, head] = tokens
        return exits
