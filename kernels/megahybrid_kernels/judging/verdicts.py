"""Each case in each dtype: right by its reference in float64, wrong, or failing."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from torch import Tensor

from megahybrid_kernels.judging import measuring
from megahybrid_kernels.judging.case import Case, Inputs
from megahybrid_kernels.judging.sizes import Size
from megahybrid_kernels.sequences import Sequences

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PROCESSES = 12  # each takes half a gigabyte of a GPU
_SHOWN = {"reference": "PyTorch", "varlen": "torch's varlen_attn", "triton": "Triton"}


@dataclass(frozen=True)
class Verdict:
    """What is to be said of an op in one dtype, and whether it is right."""

    said: str
    right: bool
    error: float = 0.0


def chosen_cases(size: Size, device: torch.device) -> list[Case]:
    """All that differ on this device: the variants make a difference to kernels alone."""
    return [case for case in size.every_case() if device.type == "cuda" or not case.variant]


def judge_apart(size: Size, device: torch.device, numbers: Sequence[int] | None = None) -> Iterator[list[Verdict]]:
    """The verdicts on each of all cases, or those of `numbers`, from processes of their own, in order.

    A kernel that reads or writes where it must not leaves its process without a GPU, and would make all others look
    wrong. And side by side their compilers, which take most of the time, end sooner.
    """
    numbers = range(len(chosen_cases(size, device))) if numbers is None else numbers
    processes = min(len(DTYPES) * len(numbers), os.cpu_count() or 1, _PROCESSES)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        judged = [[pool.submit(_judge_number, n, size, device, dtype) for dtype in DTYPES] for n in numbers]
        for verdicts in judged:
            yield [_result(each) for each in verdicts]


def _result(verdict: Future[Verdict]) -> Verdict:
    try:
        return verdict.result()
    except BrokenProcessPool:
        return Verdict("its process, or one beside it, was killed", False)


def _judge_number(number: int, size: Size, device: torch.device, dtype: str) -> Verdict:
    torch.set_num_threads(1)
    return judge(chosen_cases(size, device)[number], device, dtype)


def judge(case: Case, device: torch.device, dtype: str) -> Verdict:
    """Of the path that the op takes here; dtype: a key of `DTYPES`."""
    name = f"{case.variant}, {dtype}" if case.variant else dtype
    try:
        backend, errors = _errors(case, device, DTYPES[dtype])
    except Exception as error:  # a kernel may fail in any way, and the others are still worth knowing
        return Verdict(f"{name} fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}", False)
    # A NaN is the worst of all.
    worst = max(errors, key=lambda each: (not errors[each] >= 0, errors[each]))
    error, tolerance = errors[worst], 0.0 if case.judge else measuring.TOLERANCE[DTYPES[dtype]]
    if not error <= tolerance:
        return Verdict(f"{name}: {worst} is off by {error:.1e}, more than {tolerance:.1e}", False)
    return Verdict(f"{backend} {dtype} {error:7.1e} of {tolerance:7.1e}", True, error)


def _errors(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, float]]:
    """The path that the op takes, and its errors."""
    inputs, sequences, cotangent = prepared(case, device, dtype)
    backend, op = next(iter(measuring.picked(case, inputs, sequences).items()))
    return _SHOWN[backend], measuring.errors(case, op, inputs, sequences, cotangent)


def prepared(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Inputs, Sequences, Tensor | None]:
    """Inputs, borders, and the output's gradient, if there is one."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: each.to(device) for name, each in case.make(dtype, generator).items()}
    sequences = Sequences.of(case.lengths, device)
    if not case.backward:
        return inputs, sequences, None
    like = measuring.run(case, case.public(), inputs, sequences)["output"]
    return inputs, sequences, torch.randn(like.shape, generator=generator).to(device, dtype)
