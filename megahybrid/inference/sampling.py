"""The choice of the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megahybrid.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises UserError for a value out of range.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the so many likeliest tokens; 0 for all.
        top_p: of these, only the fewest likeliest ones that together have this probability; 1 for all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that were there already (Keskar et
            al., arXiv 1909.05858, section 4.1); 1 for none.
        seed: of the draws. A sequence's draws are a function of seed and place alone.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        ranges = {
            "temperature": (0 <= self.temperature < float("inf"), "at least 0 and finite"),
            "top-k": (self.top_k >= 0, "at least 0"),
            "top-p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition-penalty": (0 < self.repetition_penalty < float("inf"), "above 0 and finite"),
            "seed": (-(2**63) <= self.seed < 2**63, "a number of 64 bits"),
        }
        for name, (fits, needed) in ranges.items():
            if not fits:
                raise UserError(f"--{name} is {getattr(self, name.replace('-', '_'))}; it must be {needed}.")

    def choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Tokens int64 `[rows]` for logits `[rows, vocabulary]`, penalised already, and draws from [0, 1), float64
        `[rows]`."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities, tokens = self.candidates(logits)
        total = probabilities.cumsum(-1)
        place = torch.searchsorted(total, draws.to(total)[:, None] * total[:, -1:], right=True)
        last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding could lead behind it
        return tokens.gather(-1, torch.minimum(place, last))[:, 0]

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, float64 `[rows, vocabulary]`, in falling order, and the tokens that have them, int64.

        What top-k and top-p leave out has probability 0; the others are not made to sum to 1 again. Of equally likely
        tokens the lower number comes first.
        """
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            logits = logits[:, : self.top_k]
            tokens = tokens[:, : self.top_k]
        probabilities = torch.softmax(logits.double() / self.temperature, -1)
        if self.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        return probabilities, tokens


def penalise(logits: Tensor, present: Tensor, penalty: float) -> Tensor:
    """Logits `[rows, vocabulary]` with those of tokens that are `present` (bool, the same shape) made less likely."""
    return torch.where(present, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
