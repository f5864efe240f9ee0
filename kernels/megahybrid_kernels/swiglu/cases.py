"""How SwiGLU's product is judged."""

from __future__ import annotations

from dataclasses import dataclass

from megahybrid_kernels.judging.case import Case, Lengths, Shape, normals, packed


@dataclass(frozen=True)
class SwiGLU(Shape):
    """Of `intermediate` channels."""

    intermediate: int

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        inner = (sum(lengths), self.intermediate)
        shape, make = f"{packed(lengths)} intermediate={self.intermediate}", normals(gate=inner, up=inner)
        place = ("swiglu",) * 3
        return [Case(*place, shape, lengths, make, lambda op, x, sequences: op(x["gate"], x["up"]))]
