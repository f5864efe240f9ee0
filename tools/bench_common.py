"""What the benchmarks of single kernels share: judging against float64, timing, the machine."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from megahybrid_kernels.tuning import Launch

Tuning = TypeVar("Tuning")


def changed(tune: Tuning, changes: str) -> Tuning:
    """An op's tuning with what `changes` says in place: `name=number` or, for a launch, numbers with commas between."""
    for change in changes.split():
        name, _, value = change.partition("=")
        numbers = [int(number) for number in value.split(",")]
        new = Launch(*numbers) if isinstance(getattr(tune, name), Launch) else type(getattr(tune, name))(numbers[0])
        tune = replace(tune, **{name: new})
    return tune


def gradients(op: Callable, inputs: dict[str, Tensor], cotangent: Tensor, *rest) -> tuple[Tensor, ...]:
    """Output and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    y = op(*leaves, *rest)
    return y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))


def errors(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], *tolerances: float) -> list[float]:
    """Norm of the difference by the norm, for each pair. Exits when one is further off than its tolerance.

    tolerances: one for each pair, or a single one for all.
    """
    found = [
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(actual, expected, strict=True)
    ]
    tolerances = tolerances if len(tolerances) > 1 else tolerances * len(found)
    if not all(error <= tolerance for error, tolerance in zip(found, tolerances, strict=True)):
        sys.exit(f"{sys.argv[0]}: errors {found} are above {tolerances}; nothing was timed.")
    return [round(error, 5) for error in found]


def median(call: Callable[[], object]) -> float:
    """Milliseconds."""
    return round(do_bench(call, warmup=25, rep=150, return_mode="median"), 4)


def queued_median(call: Callable[[], object]) -> float:
    """Milliseconds of the GPU alone: each call waits behind a sleep in which the host launches all of it."""
    times, cache = [], torch.empty(2**26, device="cuda")  # larger than any L2 cache
    for number in range(24):
        torch.cuda._sleep(40_000_000)  # cycles: some 20 ms
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number > 3:
            times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def kernels(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one call, kernel by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    averages = [(event.key, event.device_time_total / 1e4) for event in profile.key_averages()]
    return {key[:60]: round(ms, 4) for key, ms in sorted(averages, key=lambda x: -x[1]) if ms > 1e-3}


def causal(shape: tuple[int, int, int, int], forward: bool = False) -> float:
    """cuDNN's milliseconds of causal attention, forward and backward, for bf16 `[batch, heads, tokens, head_dim]`."""
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=not forward) for _ in range(3))
    cotangent = torch.randn_like(q)

    def call():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if not forward:
            torch.autograd.grad(y, (q, k, v), cotangent)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return median(call)


def copy_bandwidth() -> dict[str, object]:
    """Of a device-to-device copy, bytes read and written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    ms = median(lambda: target.copy_(source))
    return {"op": "copy", "row": "2 GiB", "ms": ms, "gb_s": round(2 * source.numel() * 4 / ms / 1e6)}


def versions() -> str:
    """The GPU and the software."""
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
