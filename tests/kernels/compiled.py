"""What Triton compiles the kernels to, for a GPU that need not be there.

    python tests/kernels/compiled.py ARCHITECTURE [--dtype bf16] [--size narrow] [--op OP] [--only REGEX] [--most N]

Run as a program, with Triton's compiler in place of its interpreter: `doctor`'s cases meet tensors that have shapes but
no memory, and each kernel that they launch is compiled by the architecture's table of launches. Prints a line of JSON
for each: kernel, shared memory and spills in bytes, registers of a thread, columns of tensor memory, options, or what
was raised. Minutes; Triton's cache keeps them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
# What others have compiled says nothing of registers.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "compiled"))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime import driver

from megahybrid_kernels import targets
from megahybrid_kernels.judging import measuring, shapes
from megahybrid_kernels.judging.sizes import CHECKED, SIZES, Size
from megahybrid_kernels.judging.verdicts import DTYPES, prepared
from megahybrid_kernels.launch import Kernel
from tests.doctor.launched import kernels_without_memory, kind


def attentions(head_dim: int) -> tuple[shapes.Shape, ...]:
    return (
        shapes.Attention(2, head_dim),
        shapes.LTEAttention(2, head_dim, near_buffer=64),
        shapes.RetentionRouter(2, head_dim),
        shapes.NativeSparseAttention(2, head_dim, near_num_blocks=4),
    )


# Every op, and the other head dims of those that have tiles of heads.
SHAPES = {
    "narrow": SIZES["check"].shapes,
    "small": (shapes.GatedDeltaRule(2, 64, 64), *attentions(32)),
    "wide": (shapes.GatedDeltaRule(2, 256, 256), *attentions(128)),
    "widest": attentions(256),
}


class Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, architecture: str):
        number = architecture.removeprefix("sm_")
        cuda = number != architecture
        self.target = GPUTarget("cuda", int(number), 32) if cuda else GPUTarget("hip", architecture, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def note_what_ptxas_says() -> None:
    """Adds registers and spills to what Triton keeps of a kernel."""
    make, knobs.nvidia.dump_ptxas_log = CUDABackend.make_cubin, True

    def make_cubin(self, source, metadata, *rest) -> bytes:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            cubin = make(self, source, metadata, *rest)
        metadata["registers"] = int(re.search(r"Used (\d+) registers", said.getvalue())[1])
        metadata["spills"] = int(re.search(r"(\d+) bytes spill stores", said.getvalue())[1])
        return cubin

    CUDABackend.make_cubin = make_cubin


def needs(kernel: CompiledKernel) -> dict[str, int]:
    """What a program of it takes."""
    found = {"shared": kernel.metadata.shared, "tensor": getattr(kernel.metadata, "tmem_size", None) or 0}
    if (assembly := kernel.asm.get("amdgcn")) is None:
        return found | {"registers": kernel.metadata.registers, "spills": kernel.metadata.spills}
    spilled, registers = (int(re.search(rf"\.vgpr_{x}:\s+(\d+)", assembly)[1]) for x in ("spill_count", "count"))
    return found | {"registers": registers, "spills": 4 * spilled}


def compiling(only: str, most: float) -> Callable[[Kernel, int], Callable[..., None]]:
    """In place of `Kernel.__getitem__`."""
    seen: set[str] = set()

    def getitem(kernel: Kernel, programs: int) -> Callable[..., None]:
        def launch(*arguments, **options) -> None:
            case = kind(kernel, arguments, options)
            if case in seen or not re.search(only, kernel.name):
                return
            seen.add(case)
            line = {"kernel": kernel.name}
            try:
                line |= needs(kernel.jit.run(*arguments, grid=(programs,), warmup=True, **options))
            except Exception as error:  # Triton's compilers raise what they like
                line["raised"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            shown = {name: value for name, value in options.items() if isinstance(value, int | str)}
            print(json.dumps(line | {"options": shown}), flush=True)
            if len(seen) >= most:
                sys.exit()

        return launch

    return getitem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--size", default="narrow", choices=SHAPES)
    parser.add_argument("--only", default="", help="kernels whose names this regular expression finds")
    parser.add_argument("--op", help="its folder's name; all ops without")
    parser.add_argument("--most", type=float, default=math.inf, help="kernels, after which it ends")
    given = parser.parse_args()
    of_architecture = {name: table.name for table in targets.TABLES.values() for name in table.architectures}
    targets.FORCED = of_architecture[given.architecture]
    driver.set_active(Driver(given.architecture))
    note_what_ptxas_says()
    Kernel.__getitem__ = compiling(given.only, given.most)
    with kernels_without_memory():
        for case in Size(CHECKED, SHAPES[given.size], varied=given.size == "narrow").every_case():
            if given.op not in (None, case.module):
                continue
            inputs, sequences, cotangent = prepared(case, torch.device("meta"), DTYPES[given.dtype])
            measuring.run(case, case.public(), inputs, sequences, cotangent)


if __name__ == "__main__":
    main()
