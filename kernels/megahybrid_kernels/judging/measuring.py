"""How an op is judged and timed: against its PyTorch reference in float64, then by the clock."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from megahybrid_kernels.judging.case import Case, Inputs, Op
from megahybrid_kernels.sequences import Sequences

# Largest norm of a difference, as a part of the norm of the float64 result.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
_CPU_CALLS = (5, 50)


class WrongResult(Exception):
    """An op's result differs from what it should be."""


def run(case: Case, op: Op, inputs: Inputs, sequences: Sequences, cotangent: Tensor | None = None) -> dict[str, Tensor]:
    """The output and, with a cotangent for it, the gradient of every differentiable input, by name."""
    if cotangent is None:
        with torch.no_grad():
            return {"output": case.call(op, inputs, sequences)}
    names = [name for name in inputs if name not in case.constants]
    leaves = inputs | {name: inputs[name].detach().requires_grad_() for name in names}
    output = case.call(op, leaves, sequences)
    gradients = torch.autograd.grad(output, [leaves[name] for name in names], cotangent.to(output.dtype))
    return {"output": output.detach()} | {f"d {name}": g for name, g in zip(names, gradients, strict=True)}


def errors(
    case: Case, op: Op, inputs: Inputs, sequences: Sequences, cotangent: Tensor | None = None
) -> dict[str, float]:
    """How far the output and every gradient are from the reference in float64, or from what the case judges by."""
    results = run(case, op, inputs, sequences, cotangent)
    if case.judge is not None:
        return {"output": case.judge(results["output"], inputs, sequences)}
    reference = getattr(case.load().reference, case.reference or case.function)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = run(case, reference, exact, sequences, cotangent)
    return {name: relative_error(results[name], expected[name]) for name in expected}


def judge(case: Case, op: Op, inputs: Inputs, sequences: Sequences, cotangent: Tensor | None, tolerance: float) -> None:
    """Raises WrongResult when the output or a gradient is further off than the tolerance."""
    for name, error in errors(case, op, inputs, sequences, cotangent).items():
        if not error <= tolerance:
            raise WrongResult(f"{name} is off by {error:.1e}, more than {tolerance:.1e}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference by the norm of the expected, in float64."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def milliseconds(call: Callable[[], object], device: torch.device, seconds: float = 0.3) -> list[float]:
    """20th, 50th and 80th percentile of a call's time, of calls that take about `seconds`, but five on a CPU."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=round(150 * seconds), rep=round(1e3 * seconds), quantiles=[0.2, 0.5, 0.8])
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _CPU_CALLS[0] or (len(times) < _CPU_CALLS[1] and time.perf_counter() - began < 2 * seconds):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return [deciles[1], deciles[4], deciles[7]]


def picked(case: Case, inputs: Inputs, sequences: Sequences) -> dict[str, Op]:
    """The op as it is picked for these inputs, under its backend's name, and the reference."""
    public, module, name = case.public(), case.load().reference, case.reference or case.function
    reference, piece = getattr(module, name), case.piece or name
    with mock.patch.object(module, piece, wraps=getattr(module, piece)) as spy:
        run(case, public, inputs, sequences)
    if spy.called:
        return {"reference": public}
    return {"varlen" if case.function == "attention" else "triton": public, "reference": reference}


def device_name(device: torch.device) -> str:
    """The processor, with its threads, or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> str:
    """Of what the numbers depend on."""
    try:
        import triton

        return f"torch {torch.__version__} triton {triton.__version__}"
    except ImportError:
        return f"torch {torch.__version__}"
