"""Every op of megahybrid_kernels as it is picked on this device: right by its reference in float64, and how fast."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from megahybrid.config.schema import Config
from megahybrid.doctor import measuring
from megahybrid.doctor.cases import SIZES, Case, Inputs, Size, cases, every_case
from megahybrid.doctor.finding import Finding
from megahybrid.model.settings import Settings
from megahybrid_kernels import Sequences

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SECONDS = 0.05  # of calls for each time
_PROCESSES = 12  # each takes half a gigabyte of a GPU


@dataclass(frozen=True)
class Verdict:
    """What is to be said of an op in one dtype, and whether it is right."""

    said: str
    right: bool
    error: float = 0.0


def check(device: torch.device, config: Config | None = None, chosen: list[Case] | None = None) -> Iterator[Finding]:
    """A finding for each op, prefill and decode included; `chosen` in place of all cases.

    Judged in bf16 and fp32, at the shapes of `config`'s model where there is one, and timed, if right, on a GPU at a
    0.4B model's size in bf16. Of an op's cases the worst is shown.
    """
    size, timed = size_of(config, device), {}
    if device.type == "cuda":
        timed = {case.op: case for case in cases(SIZES["large"])}
    apart = device.type == "cuda" and chosen is None
    chosen = chosen_cases(size, device) if chosen is None else chosen
    judged = judge_apart(size, device) if apart else ([_judge(case, device, d) for d in _DTYPES] for case in chosen)
    for op, each in groupby(zip(chosen, judged, strict=True), key=lambda pair: pair[0].op):
        by_dtype = list(zip(*(verdicts for _, verdicts in each), strict=True))
        parts, right = _said(by_dtype), all(verdict.right for verdicts in by_dtype for verdict in verdicts)
        if right and op in timed:
            try:
                parts.append(_speed(timed[op], device))
            except torch.OutOfMemoryError:
                parts.append("not timed: out of memory")
        yield Finding(f"{op:24}{' · '.join(parts)}", right)


def _said(by_dtype: list[tuple[Verdict, ...]]) -> list[str]:
    """Of each dtype what is wrong, or else the worst; and how many cases there are."""
    parts = []
    for verdicts in by_dtype:
        wrong = [verdict.said for verdict in verdicts if not verdict.right]
        parts += wrong or [max(verdicts, key=lambda verdict: verdict.error).said]
    count = len(by_dtype[0])
    return parts + ([f"{count} shapes"] if count > 1 else [])


def chosen_cases(size: Size, device: torch.device) -> list[Case]:
    """All that differ on this device: the variants make a difference to kernels alone."""
    return [case for case in every_case(size) if device.type == "cuda" or not case.variant]


def judge_apart(size: Size, device: torch.device, numbers: Sequence[int] | None = None) -> Iterator[list[Verdict]]:
    """The verdicts on each of all cases, or those of `numbers`, from processes of their own, in order.

    A kernel that reads or writes where it must not leaves its process without a GPU, and would make all others look
    wrong. And side by side their compilers, which take most of the time, end sooner.
    """
    numbers = range(len(chosen_cases(size, device))) if numbers is None else numbers
    processes = min(len(_DTYPES) * len(numbers), os.cpu_count() or 1, _PROCESSES)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        judged = [[pool.submit(_judge_number, n, size, device, dtype) for dtype in _DTYPES] for n in numbers]
        for verdicts in judged:
            yield [_result(each) for each in verdicts]


def _result(verdict: Future[Verdict]) -> Verdict:
    try:
        return verdict.result()
    except BrokenProcessPool:
        return Verdict("its process, or one beside it, was killed", False)


def _judge_number(number: int, size: Size, device: torch.device, dtype: str) -> Verdict:
    torch.set_num_threads(1)
    return _judge(chosen_cases(size, device)[number], device, dtype)


def _judge(case: Case, device: torch.device, dtype: str) -> Verdict:
    """Of the path that the op takes here."""
    name = f"{case.variant}, {dtype}" if case.variant else dtype
    try:
        backend, errors = _errors(case, device, _DTYPES[dtype])
    except Exception as error:  # a kernel may fail in any way, and the others are still worth knowing
        return Verdict(f"{name} fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}", False)
    # A NaN is the worst of all.
    worst = max(errors, key=lambda each: (not errors[each] >= 0, errors[each]))
    error, tolerance = errors[worst], 0.0 if case.judge else measuring.TOLERANCE[_DTYPES[dtype]]
    if not error <= tolerance:
        return Verdict(f"{name}: {worst} is off by {error:.1e}, more than {tolerance:.1e}", False)
    return Verdict(f"{backend} {dtype} {error:7.1e} of {tolerance:7.1e}", True, error)


def size_of(config: Config | None, device: torch.device) -> Size:
    """A thousand tokens at the shapes that a rank of `config` has; without a GPU, where kernels are not what is run,
    at its head dims alone."""
    size = SIZES["check"]
    if config is None:
        return size
    model, ranks, settings = config.model, config.parallel.tensor, Settings.of(config)
    size = replace(
        size, head_dim=model.attention.head_dim, gdn_head_dim=model.gdn.head_dim, gdn_value_dim=model.gdn.value_head_dim
    )  # fmt: skip
    if device.type != "cuda":
        return size
    return replace(
        size,
        hidden=model.hidden_size,
        intermediate=settings.model.intermediate_size // ranks,
        vocabulary=model.vocab_size // ranks,
        heads=max(1, settings.model.attention.num_kv_heads // ranks),  # of a kind that the pattern lacks it may be none
        groups=model.attention.num_heads // settings.model.attention.num_kv_heads,
        gdn_heads=max(1, model.gdn.num_heads // ranks),
        conv_taps=model.gdn.conv_size,
        router_taps=model.lte.conv_size,
        router_dilation=model.lte.conv_dilation,
        far_window=model.attention.window_size,
        far_lte_window=model.lte.window_size,
        far_buffer=model.lte.buffer_size,
        sinks=model.lte.sink_size,
        varied=False,
    )


def _errors(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, float]]:
    """The path that the op takes, and its errors."""
    inputs, sequences, cotangent = _inputs(case, device, dtype)
    backend, op = next(iter(measuring.picked(case, inputs, sequences).items()))
    shown = {"reference": "PyTorch", "varlen": "torch's varlen_attn", "triton": "Triton"}[backend]
    return shown, measuring.errors(case, op, inputs, sequences, cotangent)


def _speed(case: Case, device: torch.device) -> str:
    """Times, and rates of the bytes that must move at least: inputs and outputs, and for both directions inputs and
    the output's gradient once more, and the inputs' gradients."""
    inputs, sequences, cotangent = _inputs(case, device, torch.bfloat16)
    op = getattr(case.load(), case.function)
    output = measuring.run(case, op, inputs, sequences)["output"].nbytes
    read = sum(each.nbytes for each in inputs.values())
    directions = {"forward": (None, read + output)}
    if cotangent is not None:
        directions["with backward"] = (cotangent, 3 * read + 2 * output)
    said = []
    for name, (seed, moved) in directions.items():
        call = lambda seed=seed: measuring.run(case, op, inputs, sequences, seed)  # noqa: E731
        milliseconds = measuring.milliseconds(call, device, _SECONDS)[1]
        said.append(f"{name} {milliseconds:.3g} ms, {moved / milliseconds / 1e6:,.0f} GB/s")
    return " · ".join(said)


def _inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Inputs, Sequences, Tensor | None]:
    """Inputs, borders, and the output's gradient, if there is one."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: each.to(device) for name, each in case.make(dtype, generator).items()}
    sequences = Sequences.of(case.sequences.lengths, device)
    if not case.backward:
        return inputs, sequences, None
    like = measuring.run(case, getattr(case.load(), case.function), inputs, sequences)["output"]
    return inputs, sequences, torch.randn(like.shape, generator=generator).to(device, dtype)
