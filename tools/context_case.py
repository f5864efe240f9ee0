"""What tools/bench_context measures; importing it must not import megahybrid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megahybrid.config import Config

VARIANTS = {
    "G": ("G", []),
    "L capped": ("L", ["model.lte.train_cap=true"]),
    "L": ("L", ["model.lte.train_cap=false"]),
    "S": ("S", []),
    "F": ("F", []),
    "N": ("N", []),
}
JUDGED = 0  # in place of a number of tokens: the documents that are judged
_ONE = ("train.micro_batch_size=1", "train.global_batch_size=1", "train.recompute=none")


@dataclass(frozen=True)
class Given:
    """What is measured.

    Attributes:
        recipe, changed: the model's sizes and the type of its activations.
        judged: lengths of the documents that outputs and gradients are compared on.
        share: of the tokens that L's heads keep; without a cap as many as the buffer holds, at most.
        folder: where processes leave what others read.
    """

    recipe: str
    changed: tuple[str, ...]
    judged: tuple[int, ...]
    share: float
    folder: Path

    def config(self, variant: str, tokens: int, ranks: int) -> Config:
        """Of a model that has one layer of the mixer."""
        from megahybrid.config import load_config

        letter, more = VARIANTS[variant]
        sizes = [f"model.pattern={letter}", f"train.seq_length={tokens}", f"parallel.context={ranks}"]
        return load_config(self.recipe, [*self.changed, *more, *sizes, *_ONE])

    def kept(self, variant: str, tokens: int) -> float:
        """The share of the tokens that is to have a positive score; JUDGED: half of them."""
        if tokens == JUDGED or variant != "L":
            return 0.5 if tokens == JUDGED else self.share
        return min(self.share, self.config(variant, tokens, 1).model.lte.buffer_size / tokens)
