"""The controller that drives every head's number of retained tokens to the eviction buffer's size.

Source: He & Garner, arXiv 2510.20787; the weight lambda of the L1 term grows by a factor while a head keeps more tokens
than its buffer holds and shrinks while it keeps clearly fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid.mixers.lte import LTEConfig


class LambdaController:
    """Lambda and the moving average of kept tokens, for every LTE layer and key-value head.

    Attributes:
        lambdas: fp32 `[layers, heads]`; the mixers read their row of it.
        kept: fp32 `[layers, heads]`, moving average of tokens kept a sequence of training length.
        kept_now: fp32 `[layers, heads]`, tokens kept a sequence of training length in the last step.
    """

    def __init__(self, config: LTEConfig, seq_length: int, layers: int, heads: int, device: torch.device | str = "cpu"):
        self.config, self.seq_length = config, seq_length
        self.lambdas = torch.zeros(layers, heads, device=device)
        self.kept = torch.full((layers, heads), float(seq_length), device=device)
        self.kept_now = self.kept.clone()

    def update(self, step: int, kept: Tensor, positions: int) -> None:
        """Take in one optimizer step's counts, and every update_interval steps adjust lambda.

        Args:
            step: 1-based number of the optimizer step.
            kept: int64 `[layers, heads]`, positions with a positive score, over the whole global batch.
            positions: how many positions were counted a head; with 0 (only tiny documents) nothing changes.
        """
        if positions:
            rate = 2 / (1 + self.config.loss.update_interval / 2)
            self.kept_now = kept.to(self.kept) * (self.seq_length / positions)
            self.kept = (1 - rate) * self.kept + rate * self.kept_now
        if step % self.config.loss.update_interval == 0:
            self.lambdas.copy_(self._adjusted())  # in place: the mixers hold views

    def _adjusted(self) -> Tensor:
        loss, size = self.config.loss, self.config.buffer_size
        over = self.kept > loss.tolerance * size
        under = self.kept < size
        grown = torch.where(over & ~under, self.lambdas * loss.increase, self.lambdas)
        shrunk = torch.where(under & ~over, grown / loss.decrease, grown).clamp(max=loss.maximum)
        cut = torch.where(shrunk < loss.initial, torch.zeros_like(shrunk), shrunk)
        return torch.where((cut == 0) & over, torch.full_like(cut, loss.initial), cut)

    def state(self) -> dict[str, list[list[float]]]:
        """What a checkpoint keeps; float32 survives the way through JSON's decimals exactly."""
        return {"lambdas": self.lambdas.tolist(), "kept": self.kept.tolist()}

    def load_state(self, state: dict[str, list[list[float]]]) -> None:
        """Take over a state that `state` gave."""
        self.lambdas.copy_(torch.tensor(state["lambdas"]))
        self.kept = torch.tensor(state["kept"]).to(self.kept)
