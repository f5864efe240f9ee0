"""What GPUs can do at most, as their vendors say."""

from __future__ import annotations

import functools

import torch

# Dense bf16 tensor core rate by part of the device's name, FLOP/s (data sheets).
_PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


@functools.cache
def peak_flops() -> float | None:
    """FLOP/s of this process's GPU in dense bf16; None without a GPU and on an unknown one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
