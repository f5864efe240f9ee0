"""Every op of megahybrid_kernels: its inputs, its call and how a result is judged, for `doctor` and tools/bench."""

from __future__ import annotations

from megahybrid.doctor.cases import attention, block, gdn, lte
from megahybrid.doctor.cases.case import SIZES, Case, Inputs, Op, Size

__all__ = ["SIZES", "Case", "Inputs", "Op", "Size", "cases", "every_case"]

_GROUPS = (gdn, attention, lte, block)


def cases(size: Size) -> list[Case]:
    """Every op that a pass over whole sequences runs, at one size."""
    return [case for group in _GROUPS for case in group.cases(size)]


def every_case(size: Size) -> list[Case]:
    """These, prefill and decode, and what other shapes make of an op; cases of one op are neighbours."""
    every = [case for group in _GROUPS for case in (*group.cases(size), *group.more_cases(size))]
    order = {op: number for number, op in enumerate(dict.fromkeys(case.op for case in every))}
    return sorted(every, key=lambda case: order[case.op])
