"""What devices can do at most, as their vendors say, what memory they have left and how torch takes it, and in which
types they compute."""

from __future__ import annotations

import functools
import math
import os
import re
from pathlib import Path

import torch

PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bf16 tensor core rate by part of the device's name, FLOP/s (data sheets)."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By the names that `train.dtype`, `parallel.gradient_reduction` and `--dtype` have for them."""

_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"


def prepare_allocator(graphs: bool = False) -> str:
    """Let this process and those it starts take a GPU's memory in segments that grow, unless one of torch's variables
    says otherwise or steps are CUDA graphs, which were tried without; returns what the variables are now.

    A segment of fixed length is of no use to a longer tensor: in training of long samples, a fifth of what was taken.
    torch reads them when CUDA is initialised.
    """
    if not graphs and not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    return ", ".join(f"{name}={os.environ[name]}" for name in _ALLOCATOR if name in os.environ)


@functools.cache
def peak_flops() -> float | None:
    """FLOP/s of this process's GPU in dense bf16; None without a GPU and on an unknown one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still take, of its GPU or as its part of the machine's memory; infinite where no one
    says."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else math.inf


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it for a process that is to use it alone;
    empty without any."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


def gpu_memory() -> float:
    """Bytes of the smallest of this process's GPUs; infinite without one."""
    gpus = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus), default=math.inf)
