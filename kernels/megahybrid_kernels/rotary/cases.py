"""How rotary position embedding is judged."""

from __future__ import annotations

from dataclasses import dataclass

from megahybrid_kernels.judging.case import Case, Lengths, Shape, normals, packed


@dataclass(frozen=True)
class Rotary(Shape):
    """Of `heads` heads."""

    heads: int
    head_dim: int

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        return [
            Case(
                "rotary",
                "rotary",
                "rotary",
                f"{packed(lengths)} heads={self.heads} head_dim={self.head_dim}",
                lengths,
                normals(x=(sum(lengths), self.heads, self.head_dim)),
                lambda op, x, sequences: op(x["x"], sequences.positions, 10000.0),
            )
        ]
