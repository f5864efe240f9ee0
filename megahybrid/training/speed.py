"""Model FLOP utilisation and memory of a training step."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from megahybrid.parallel import groups

# Dense bf16 tensor core rate by part of the device's name, FLOP/s (vendors' data sheets).
_PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def model_flops_utilization(flops_per_token: float, tokens_per_second: float) -> dict[str, float]:
    """`{"mfu": …}`: the model's FLOPs a second, as `plan` counts them, over the GPUs' peak; {} on an unknown device."""
    peak = _peak()
    return {} if peak is None else {"mfu": tokens_per_second * flops_per_token / (peak * dist.get_world_size())}


def memory() -> dict[str, Any]:
    """`{"memory_bytes": …}`: the most GPU memory that any process has had allocated; {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {"memory_bytes": groups.max_over_all(torch.cuda.max_memory_allocated())}


@functools.cache
def _peak() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
