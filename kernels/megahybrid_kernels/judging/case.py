"""What a case is, and what the ops' cases are made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megahybrid_kernels.sequences import Sequences

Inputs = dict[str, Tensor]
Op = Callable[..., Any]
Make = Callable[[torch.dtype, torch.Generator], Inputs]
Lengths = tuple[int, ...]
"""Tokens of each document in a micro-batch."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        op: its name in the table.
        module, function: where the op lives, `megahybrid_kernels.<module>.<function>` and the same in its `reference`.
        shape: for the reader.
        lengths: of the documents in the micro-batch.
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
    lengths: Lengths
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

    def public(self) -> Op:
        """The op, which picks its backend."""
        return getattr(self.load(), self.function)


class Shape:
    """The sizes at which a model calls an op; `<op>/cases.py` has one for each public op."""

    def cases(self, lengths: Lengths) -> list[Case]:
        """The op over whole documents."""
        raise NotImplementedError

    def more_cases(self, lengths: Lengths, varied: bool) -> list[Case]:
        """Prefill, decode and what other lengths make of the op; `varied`: what other groups and dims do, too."""
        return []


def normal(dtype: torch.dtype, generator: torch.Generator, **shapes: tuple[int, ...]) -> Inputs:
    """Standard normal inputs by name and shape."""
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def normals(**shapes: tuple[int, ...]) -> Make:
    """`normal` of these shapes, later."""
    return lambda dtype, generator: normal(dtype, generator, **shapes)


def packed(lengths: Lengths) -> str:
    """A micro-batch, for the reader."""
    return f"tokens={sum(lengths)} sequences={len(lengths)}"
