"""Where one training step's time goes: computing, communication by process group, alone or beside it, and nothing.

On a GPU a pipeline's bubble is a kernel: who waits for a neighbour does so within NCCL's receive. So the exposed part
of "pipeline" is bubble and transfers together, and that of "tensor" and "data" has the waiting for slower ranks in it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Interval = tuple[float, float]

STEP = "measured step"
_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
# Words of Megatron-core's names for its groups, in the trace's "Process Group Description"; the first that fits.
_GROUPS = {
    "TENSOR_MODEL": "tensor",
    "DATA_PARALLEL": "data",  # also over context parallel ranks
    "CONTEXT_PARALLEL": "context",
    "PIPELINE": "pipeline",
    "EMBEDDING": "pipeline",  # of its first and last stage
    "MODEL_PARALLEL": "all",
    "default_pg": "all",
}


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in sorted intervals that do not touch."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        elif end > start:
            joined.append((start, end))
    return joined


def subtract(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The points of a union that are not in another."""
    left, skip = [], 0
    for start, end in intervals:
        while skip < len(others) and others[skip][1] <= start:
            skip += 1
        number = skip
        while number < len(others) and others[number][0] < end:
            if others[number][0] > start:
                left.append((start, others[number][0]))
            start = others[number][1]
            number += 1
        if start < end:
            left.append((start, end))
    return left


def total(intervals: Iterable[Interval]) -> float:
    """Sum of the lengths."""
    return sum(end - start for start, end in intervals)


def named_group(name: str, args: Mapping[str, Any]) -> str | None:
    """tensor, context, pipeline, data or all: whose communication an event is by its name and the trace's group.

    Pipelines send and receive, and one of their two directions goes through the default group; so do NCCL's exchanges.
    """
    lowered, description = name.lower(), str(args.get("Process Group Description", ""))
    if "CONTEXT" not in description and ("sendrecv" in lowered or lowered.endswith((":send", ":recv"))):
        return "pipeline"
    return next((part for words, part in _GROUPS.items() if words in description), None)


def only_group(sizes: Mapping[str, int]) -> str:
    """Of a layout's tensor, context, pipeline and data parallel groups the one with more than one process, else
    "unknown"; "all" where there is one process.
    """
    split = [part for part, size in sizes.items() if size > 1]
    return (split or ["all"])[0] if len(split) < 2 else "unknown"


def window(events: Iterable[Mapping[str, Any]]) -> Interval:
    """Start and end of the step in a trace, µs."""
    [step] = [each for each in events if each.get("name") == STEP and each.get("cat") == "user_annotation"]
    return step["ts"], step["ts"] + step["dur"]


def classify(events: Iterable[Mapping[str, Any]], sizes: Mapping[str, int]) -> Iterator[tuple[str, float, float]]:
    """(part, start, end) of what runs within the step, µs: of kernels and copies, or without a GPU of torch's own ops
    and gloo's collectives, whose groups have no names.

    A collective without one belongs to the group of the others on its stream, since every group has its own.
    """
    events = [each for each in events if each.get("ph") == "X"]
    first, last = window(events)
    on_gpu = any(each.get("cat") == "kernel" for each in events)
    streams: dict[Any, str] = {}
    for each in filter(communicates, events):
        args = each.get("args", {})
        if "stream" in args and (group := named_group(each["name"], args)):
            streams[args["stream"]] = group
    for each in events:
        category, args = each.get("cat"), each.get("args", {})
        start, end = max(each["ts"], first), min(each["ts"] + each["dur"], last)
        if start >= end:
            continue
        if communicates(each):
            group = named_group(each["name"], args) or streams.get(args.get("stream")) or only_group(sizes)
            # Context parallel ranks send and receive, too, in a group whose name a trace may lack.
            unnamed = group == "pipeline" and sizes.get("pipeline", 1) == 1
            yield only_group(sizes) if unnamed else group, start, end
        elif category in _GPU or (not on_gpu and category == "cpu_op" and each["name"].startswith("aten::")):
            yield "compute", start, end


def communicates(event: Mapping[str, Any]) -> bool:
    """Whether it is one of NCCL's kernels or of gloo's collectives."""
    nccl = event.get("cat") == "kernel" and event["name"].lower().startswith("nccl")
    return nccl or event["name"].startswith("gloo:")


def time_by_part(events: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """ms of a step in a chrome trace: `compute` and `idle` (nothing runs) of the clock; for each group's communication
    the sum of its kernels, and `exposed`, in which no kernel computes. Groups that overlap share exposed time, so
    compute + exposed + idle of the whole step is the step.
    """
    found: dict[str, list[Interval]] = {"compute": []}
    for part, start, end in classify(events, sizes):
        found.setdefault(part, []).append((start, end))
    computing = union(found.pop("compute"))
    whole = total([window(events)])
    communicating = subtract(union(each for group in found.values() for each in group), computing)
    times: dict[str, Any] = {
        "step": _ms(whole),
        "compute": _ms(total(computing)),
        "exposed": _ms(total(communicating)),
        "idle": _ms(whole - total(computing) - total(communicating)),
    }
    for group, intervals in sorted(found.items()):
        alone = total(subtract(union(intervals), computing))
        times[group] = {"sum": _ms(total(intervals)), "exposed": _ms(alone), "calls": len(intervals)}
    return times


def _ms(microseconds: float) -> float:
    return round(microseconds / 1e3, 2)


def traced(engine: Any, batches: Sequence[Any], step: int) -> dict[str, Any]:
    """`time_by_part` of one more step on the first and the last rank, {} on the others. A collective."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from megahybrid.parallel import groups

    rank, world = groups.world()
    if 0 < rank < world - 1:
        groups.max_over_all(0)
        engine.step(batches, step)
        return {}
    # The host's ops as well: a kernel's process group is known through the one that launched it.
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profile(activities=activities) as record:
        groups.max_over_all(0)  # the profiler's start takes seconds: nobody waits for it in the step
        with record_function(STEP):
            engine.step(batches, step)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    sizes = {
        "tensor": groups.tensor_parallel()[1],
        "context": groups.context_parallel()[1],
        "pipeline": groups.pipeline_parallel()[1],
        "data": groups.data_parallel()[1],
    }
    try:
        return {"micro_batches": len(batches), **time_by_part(_events(record), sizes)}
    except Exception as error:  # a trace that cannot be read costs no other figure
        return {"error": repr(error)}


def _events(record: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        record.export_chrome_trace(str(file))
        return json.loads(file.read_text(errors="replace"))["traceEvents"]
