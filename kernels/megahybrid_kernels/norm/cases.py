"""How the norms are judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Op, Shape, normals, packed
from megahybrid_kernels.sequences import Sequences


@dataclass(frozen=True)
class RMSNorm(Shape):
    """Of a residual stream, with the sum that comes before it."""

    hidden: int

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        flat, shape = (sum(lengths), self.hidden), f"{packed(lengths)} hidden={self.hidden}"
        norm, summed = normals(x=flat, weight=flat[1:]), normals(x=flat, residual=flat, weight=flat[1:])

        def add(op: Op, x: Inputs, sequences: Sequences) -> Tensor:
            return torch.cat(op(*x.values(), 1e-6))

        return [
            Case("rms_norm", "norm", "rms_norm", shape, lengths, norm, lambda op, x, _: op(*x.values(), 1e-6)),
            Case("add_rms_norm", "norm", "add_rms_norm", shape, lengths, summed, add),
        ]


@dataclass(frozen=True)
class GatedRMSNorm(Shape):
    """Of each head."""

    heads: int
    head_dim: int

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        wide = (sum(lengths), self.heads, self.head_dim)
        return [
            Case(
                "gated_rms_norm",
                "norm",
                "gated_rms_norm",
                f"{packed(lengths)} heads={self.heads} head_dim={self.head_dim}",
                lengths,
                normals(x=wide, gate=wide, weight=wide[2:]),
                lambda op, x, sequences: op(x["x"], x["gate"], x["weight"], 1e-6),
            )
        ]
