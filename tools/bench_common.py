"""What the benchmarks of single kernels share: judging against float64, timing, the machine."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from megahybrid_kernels.tuning import Launch

Tuning = TypeVar("Tuning")

# Without a GPU benchmarks can look at toy sizes whether they work; see `once`.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def changed(tune: Tuning, changes: str) -> Tuning:
    """An op's tuning with what `changes` says in place: `name=number` or, for a launch, numbers with commas between.

    Raises ValueError for a name that the tuning has not, or a value that is not of its kind.
    """
    for change in changes.split():
        name, _, value = change.partition("=")
        names = [field.name for field in fields(tune)]
        if name not in names:
            raise ValueError(f"'{change}' names no launch; there are {', '.join(names)}.")
        launch = isinstance(getattr(tune, name), Launch)
        numbers = [int(number) for number in value.split(",") if number.isdecimal()]
        if len(numbers) != value.count(",") + 1 or len(numbers) not in ((3, 4) if launch else (1,)):
            kind = "size,warps,stages[,registers]" if launch else "a number"
            raise ValueError(f"'{change}' should be {name}={kind}.")
        tune = replace(tune, **{name: Launch(*numbers) if launch else numbers[0]})
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


def once(call: Callable[[], object]) -> float:
    """Milliseconds of one call on the host's clock; without a GPU no figure, but a sign that it works."""
    began = time.perf_counter()
    call()
    return round(1e3 * (time.perf_counter() - began), 4)


def median(call: Callable[[], object]) -> float:
    """Milliseconds."""
    if DEVICE == "cpu":
        return once(call)
    return round(do_bench(call, warmup=25, rep=150, return_mode="median"), 4)


def queued_median(call: Callable[[], object]) -> float:
    """Milliseconds of the GPU alone: each call waits behind a sleep in which the host launches all of it."""
    if DEVICE == "cpu":
        return once(call)
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


def host_median(call: Callable[[], object]) -> float:
    """Milliseconds that the host takes to launch a call, the GPU idle before it."""
    times = []
    for _ in range(24 if DEVICE == "cuda" else 1):
        times.append(once(call))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return round(statistics.median(times), 4)


def timed(op: str, row: str, calls: list[Callable[[], object]], size: int) -> dict:
    """Milliseconds of one of the calls, in a graph of all: together they move more than the L2 cache holds."""
    if DEVICE == "cpu":
        return {"op": op, "row": row, "ms": once(calls[0])}
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / len(calls))
    ms = statistics.median(found)
    return {"op": op, "row": row, "ms": round(ms, 5), "gb_s": round(size / ms / 1e6)}


def attention_steps(batch: int, context: int, heads: int, query_heads: int = 32, head_dim: int = 64) -> dict:
    """A step of full attention in bf16, of so many sequences and KV heads after `context` tokens."""
    from megahybrid_kernels.attention.triton_decode import attention_step

    like = {"device": DEVICE, "dtype": torch.bfloat16 if DEVICE == "cuda" else torch.float16}
    q, k, v = (torch.randn(batch, each, head_dim, **like) for each in (query_heads, heads, heads))
    size = 2 * batch * heads * context * head_dim * 2
    count = max(1, 2**28 // size) if DEVICE == "cuda" else 1
    caches = [[torch.randn(batch, heads, context + 32, head_dim, **like) for _ in range(2)] for _ in range(count)]
    positions = torch.full((batch,), context, device=DEVICE)
    calls = [partial(attention_step, q, k, v, *cache, positions) for cache in caches]
    row = f"{batch} sequences, {query_heads}/{heads} heads of {head_dim}, after {context} tokens"
    return timed("attention_step", row, calls, size)


def peak_mib(call: Callable[[], object]) -> int | None:
    """Most memory that a call allocates beyond what there is."""
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def kernels(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one call, kernel by kernel."""
    if DEVICE == "cpu":
        call()
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    averages = [(event.key, event.device_time_total / 1e4) for event in profile.key_averages()]
    return {key[:60]: round(ms, 4) for key, ms in sorted(averages, key=lambda x: -x[1]) if ms > 1e-3}


def causal(shape: tuple[int, int, int, int], forward: bool = False, kv_heads: int | None = None) -> float:
    """cuDNN's milliseconds of causal attention, forward and backward, for bf16 `[batch, heads, tokens, head_dim]`; with
    as many heads of keys and values as of queries, or `kv_heads` (enable_gqa)."""
    shapes = [(shape[0], heads, *shape[2:]) for heads in (shape[1], *[kv_heads or shape[1]] * 2)]
    q, k, v = (torch.randn(each, device=DEVICE, dtype=torch.bfloat16, requires_grad=not forward) for each in shapes)
    cotangent = torch.randn_like(q)

    def call():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads is not None)
        if not forward:
            torch.autograd.grad(y, (q, k, v), cotangent)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if DEVICE == "cuda" else SDPBackend.MATH):
        return median(call)


def copy_bandwidth() -> dict[str, object]:
    """Of a device-to-device copy, bytes read and written."""
    source = torch.randn(2**29 if DEVICE == "cuda" else 2**20, device=DEVICE)
    target = torch.empty_like(source)
    ms, size = median(lambda: target.copy_(source)), source.numel() * 4
    return {"op": "copy", "row": f"{size >> 20} MiB", "ms": ms, "gb_s": round(2 * size / ms / 1e6)}


def versions() -> str:
    """The GPU and the software."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"
