"""How one of an op's kernels is launched; each op's table says which for which dtype and head dim."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One kernel's tile and how it is compiled.

    Attributes:
        size: of the tile that a program, or a step of its loop, takes; in the dimension that the op's table says.
        warps, stages: Triton's num_warps and num_stages.
        registers: a thread's at most, on NVIDIA's GPUs alone; None is the compiler's choice.
    """

    size: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """What every launch takes; not all backends of Triton know `maxnreg`."""
        cap = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages} | cap
