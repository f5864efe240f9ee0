"""Lets Megatron-core and DeepSpeed run on CPU processes with gloo; without effect where there is a GPU."""

from __future__ import annotations

import os
import types

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when DeepSpeed is imported


class _CpuTorch(types.ModuleType):
    """The torch module with factory functions that put on the CPU what asks for "cuda"."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(function):
        def create(*args, **options):
            if str(options.get("device", "")).startswith("cuda"):
                options["device"] = "cpu"
            return function(*args, **options)

        return create


def prepare_cpu() -> None:
    """Replace the few CUDA calls of Megatron-core's layers and schedules, and keep DeepSpeed from compiling.

    Megatron-core 0.16 to 0.19 asks torch.cuda for the current device, for random states and to synchronise, and its
    schedules create small tensors on "cuda". Safe to call more than once.
    """
    if torch.cuda.is_available():
        return
    import deepspeed
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.utils as transformer_utils

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a compilation of 49 s otherwise
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *args, **options: None
    torch.cuda.get_rng_state = lambda *args, **options: torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    megatron_random._get_cuda_rng_state = lambda *args, **options: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **options: torch.set_rng_state(state)
    for module in (schedules, transformer_utils):
        if not isinstance(module.torch, _CpuTorch):
            proxy = _CpuTorch("torch")
            for name in ("zeros", "ones", "empty", "tensor"):
                setattr(proxy, name, _CpuTorch._on_cpu(getattr(torch, name)))
            module.torch = proxy
