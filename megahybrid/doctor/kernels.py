"""Every op of megahybrid_kernels, or those of a recipe's model, as it is picked on this device: right, and how fast."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch

from megahybrid.config.schema import Config
from megahybrid.doctor.finding import Finding
from megahybrid.doctor.shapes import size_of
from megahybrid_kernels.judging import measuring
from megahybrid_kernels.judging.case import Case
from megahybrid_kernels.judging.sizes import SIZES
from megahybrid_kernels.judging.verdicts import DTYPES, Verdict, chosen_cases, judge, judge_apart, prepared

_SECONDS = 0.05  # of calls for each time


def check(device: torch.device, config: Config | None = None, chosen: list[Case] | None = None) -> Iterator[Finding]:
    """A finding for each op, prefill and decode included; `chosen` in place of all cases.

    Judged in bf16 and fp32, with a `config` those that its model uses and at its shapes, and timed, if right, on a GPU
    at a 0.4B model's size in bf16. Of an op's cases the worst is shown.
    """
    size, timed = size_of(config, device), {}
    if device.type == "cuda":
        timed = {case.op: case for case in SIZES["large"].cases()}
    apart = device.type == "cuda" and chosen is None
    chosen = chosen_cases(size, device) if chosen is None else chosen
    judged = judge_apart(size, device) if apart else ([judge(case, device, d) for d in DTYPES] for case in chosen)
    for op, each in groupby(zip(chosen, judged, strict=True), key=lambda pair: pair[0].op):
        by_dtype = list(zip(*(verdicts for _, verdicts in each), strict=True))
        parts, right = _said(by_dtype), all(verdict.right for verdicts in by_dtype for verdict in verdicts)
        if right and op in timed:
            try:
                parts.append(_speed(timed[op], device))
            except torch.OutOfMemoryError:
                parts.append("not timed: out of memory")
        yield Finding(f"{op:31} {' · '.join(parts)}", right)


def _said(by_dtype: list[tuple[Verdict, ...]]) -> list[str]:
    """Of each dtype what is wrong, or else the worst; and how many cases there are."""
    parts = []
    for verdicts in by_dtype:
        wrong = [verdict.said for verdict in verdicts if not verdict.right]
        parts += wrong or [max(verdicts, key=lambda verdict: verdict.error).said]
    count = len(by_dtype[0])
    return parts + ([f"{count} shapes"] if count > 1 else [])


def _speed(case: Case, device: torch.device) -> str:
    """Times, and rates of the bytes that must move at least: inputs and outputs, and for both directions inputs and
    the output's gradient once more, and the inputs' gradients."""
    inputs, sequences, cotangent = prepared(case, device, torch.bfloat16)
    op = case.public()
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
