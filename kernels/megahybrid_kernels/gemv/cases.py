"""How products of one row are judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Op, Shape, normals
from megahybrid_kernels.sequences import Sequences


@dataclass(frozen=True)
class RowProducts(Shape):
    """Of a layer of `hidden` channels with a SwiGLU of `intermediate` ones."""

    hidden: int
    intermediate: int

    def cases(self, lengths: Lengths) -> list[Case]:
        """None: training and prefill have more rows."""
        return []

    def more_cases(self, lengths: Lengths, varied: bool) -> list[Case]:
        """Decode of one sequence."""
        hidden, inner = (1, self.hidden), (1, self.intermediate)
        shape = f"hidden={self.hidden} intermediate={self.intermediate}"
        into = {"norm": hidden[1:], "weight": (2 * self.intermediate, self.hidden)}

        def first(op: Op, x: Inputs, _: Sequences) -> Tensor:
            return op(x["x"], None, x["norm"], 1e-6, x["weight"], None)

        def summed(op: Op, x: Inputs, _: Sequences) -> Tensor:
            total = torch.empty_like(x["x"])
            y = op(x["x"], x["residual"], x["norm"], 1e-6, x["weight"], total)
            return torch.cat([y, total], 1)

        def swiglu(op: Op, x: Inputs, _: Sequences) -> Tensor:
            return op(x["gate"], x["up"], x["weight"])

        place, rest = ("add_rms_norm_gemv", "gemv", "add_rms_norm_gemv"), (shape, (1,))
        down = normals(gate=inner, up=inner, weight=(self.hidden, self.intermediate))
        return [
            Case(*place, *rest, normals(x=hidden, residual=hidden, **into), summed, backward=False),
            Case(*place, *rest, normals(x=hidden, **into), first, backward=False, variant="first"),
            Case("swiglu_gemv", "gemv", "swiglu_gemv", *rest, down, swiglu, backward=False),
        ]


@dataclass(frozen=True)
class GatedRowProduct(Shape):
    """Of heads' outputs, normalised and gated, into `hidden` channels."""

    hidden: int
    heads: int
    head_dim: int

    def cases(self, lengths: Lengths) -> list[Case]:
        """None: training and prefill have more rows."""
        return []

    def more_cases(self, lengths: Lengths, varied: bool) -> list[Case]:
        """Decode of one sequence."""
        wide = (1, self.heads, self.head_dim)
        make = normals(x=wide, gate=wide, norm=wide[2:], weight=(self.hidden, self.heads * self.head_dim))
        shape = f"hidden={self.hidden} heads={self.heads} head_dim={self.head_dim}"

        def call(op: Op, x: Inputs, _: Sequences) -> Tensor:
            return op(x["x"], x["gate"], x["norm"], 1e-6, x["weight"])

        return [Case("gated_rms_norm_gemv", "gemv", "gated_rms_norm_gemv", shape, (1,), make, call, backward=False)]
