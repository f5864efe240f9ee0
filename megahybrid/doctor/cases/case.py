"""What a case is, and the sizes that cases are made at."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megahybrid_kernels import Sequences

Inputs = dict[str, Tensor]
Op = Callable[..., Any]
Make = Callable[[torch.dtype, torch.Generator], Inputs]


@dataclass(frozen=True)
class Size:
    """One model's shapes on one rank, and the lengths of the documents in a micro-batch.

    Attributes:
        heads: key-value heads, each of `groups` query heads.
        gdn_value_dim, vocabulary: gdn_head_dim and intermediate when left out.
        window, lte_window, buffer, sinks: for these documents.
        far_window, far_lte_window, far_buffer: a model's own, for documents that are longer.
        varied: whether heads are also grouped, and values also wider than keys, though they are not here.
    """

    lengths: tuple[int, ...]
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    gdn_heads: int
    gdn_head_dim: int
    window: int
    lte_window: int
    buffer: int
    sinks: int = 4
    groups: int = 1
    gdn_value_dim: int | None = None
    vocabulary: int | None = None
    conv_taps: int = 4
    router_taps: int = 3
    router_dilation: int = 2
    far_window: int = 1024
    far_lte_window: int = 768
    far_buffer: int = 512
    varied: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return sum(self.lengths)

    @property
    def sequences(self) -> Sequences:
        """Borders of the micro-batch, on the CPU."""
        return Sequences.of(self.lengths)

    @property
    def value_dim(self) -> int:
        """Of the delta rule."""
        return self.gdn_value_dim or self.gdn_head_dim

    @property
    def packed(self) -> str:
        """The micro-batch, for the reader."""
        return f"tokens={self.tokens} sequences={len(self.lengths)}"


SIZES = {
    # Small enough for float64, with borders beside the kernels' own, and the head dims of the recipes.
    "check": Size((513, 1, 64, 300, 98, *(3,) * 16), 1024, 1408, 2, 64, 2, 128, 128, 95, 64, varied=True),
    # The micro-batch of recipes/quickstart.yaml, one of its samples made of two documents.
    "small": Size((512,) * 7 + (301, 211), 128, 384, 4, 32, 4, 32, 128, 63, 64),
    # A 0.4B model's at 4096 tokens a sample.
    "large": Size((4096,) * 7 + (3001, 1000, 95), 1024, 2816, 16, 64, 8, 128, 1024, 768, 512),
}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        op: its name in the table.
        module, function: where the op lives, `megahybrid_kernels.<module>.<function>` and the same in its `reference`.
        shape: for the reader.
        sequences: borders of the micro-batch, on the CPU.
        make: inputs from a dtype and a generator, on the CPU.
        call: runs the op on inputs and sequences, returns the one output that training differentiates.
        constants: inputs without a gradient.
        backward: whether there is a gradient at all.
        judge: error of an output, in place of the comparison with the reference in float64.
        reference: the function's name in `reference`, where it is another.
        piece: what the op's PyTorch path calls in `reference`, where that is not the whole function.
        variant: what sets it apart from the other cases of its op; it makes kernels go another way, which PyTorch does
            not: a CPU has no use for it.
    """

    op: str
    module: str
    function: str
    shape: str
    sequences: Sequences
    make: Make
    call: Callable[[Op, Inputs, Sequences], Tensor]
    constants: tuple[str, ...] = ()
    backward: bool = True
    judge: Callable[[Tensor, Inputs, Sequences], float] | None = None
    reference: str | None = None
    piece: str | None = None
    variant: str = ""

    def load(self) -> ModuleType:
        """The op's module."""
        return importlib.import_module(f"megahybrid_kernels.{self.module}")


def normal(dtype: torch.dtype, generator: torch.Generator, **shapes: tuple[int, ...]) -> Inputs:
    """Standard normal inputs by name and shape."""
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def normals(**shapes: tuple[int, ...]) -> Make:
    """`normal` of these shapes, later."""
    return lambda dtype, generator: normal(dtype, generator, **shapes)
