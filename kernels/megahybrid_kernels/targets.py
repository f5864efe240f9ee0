"""Which GPUs the kernels have launches for.

What fits depends on the shared memory of a program, and on where a family's products find their operands and leave
their sums: Hopper's operands are in shared memory, Blackwell's sums in 512 columns of tensor memory, all others' in
registers, so that these need smaller tiles for the same registers. Each op says in its `tuning` how it is launched by
each of these tables.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

log = logging.getLogger("megahybrid_kernels")


@dataclass(frozen=True)
class Table:
    """Launches of all ops that were chosen together.

    Attributes:
        name: of the first family that it was made for.
        shared: bytes of shared memory that a program takes at most.
        architectures: those that tests compile its launches for.
        precise: Triton's `input_precision` of products of fp32 operands that tf32 has too few digits for.
        chooses: whether Triton compiles loads from one of two pointers.
        overlaps: whether a launch can begin beside the one before it (CUDA's programmatic dependent launch).
    """

    name: str
    shared: int
    architectures: tuple[str, ...]
    precise: str = "tf32x3"
    chooses: bool = True
    overlaps: bool = False


HOPPER = Table("hopper", 227 * 1024, ("sm_90",), overlaps=True)
BLACKWELL = Table("blackwell", 227 * 1024, ("sm_100",), overlaps=True)
AMPERE = Table("ampere", 99 * 1024, ("sm_80", "sm_86", "sm_89", "sm_120"))
CDNA3 = Table("cdna3", 64 * 1024, ("gfx942",), precise="ieee", chooses=False)
TABLES = {table.name: table for table in (HOPPER, BLACKWELL, AMPERE, CDNA3)}

FORCED = os.environ.get("MEGAHYBRID_KERNELS_TABLE")
"""The table that every device takes, by name, for tests and benchmarks: a larger GPU runs the launches of a smaller."""
if FORCED is not None and FORCED not in TABLES:
    raise ValueError(f"MEGAHYBRID_KERNELS_TABLE is {FORCED!r}: make it one of {', '.join(TABLES)}, or unset it")


def table_of(device: torch.device) -> Table | None:
    """The table of a GPU, or None where there is none for it and its ops run in PyTorch, which is said once.

    Without a GPU it is Hopper's, which Triton's interpreter runs.
    """
    return _of_device(device) if FORCED is None else TABLES[FORCED]


@lru_cache
def _of_device(device: torch.device) -> Table | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return HOPPER
    gpu = torch.cuda.get_device_properties(device)
    table = fitting(gpu)
    if table is None:
        log.warning("%s: the kernels have no launches for such a GPU, its ops run in PyTorch.", gpu.name)
    return table


def fitting(gpu: Any) -> Table | None:
    """The table of a GPU with these properties, as `torch.cuda.get_device_properties` has them."""
    if torch.version.hip is not None:
        return CDNA3 if gpu.gcnArchName.split(":")[0] in CDNA3.architectures else None
    shared = gpu.shared_memory_per_block_optin
    if gpu.major in (9, 10) and shared >= HOPPER.shared:
        return HOPPER if gpu.major == 9 else BLACKWELL
    return AMPERE if gpu.major >= 8 and shared >= AMPERE.shared else None
