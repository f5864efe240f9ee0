"""What the benchmarks of layouts share: their notation, the list that fits a host, figures of all ranks and layouts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SHORT = ("tensor", "context", "pipeline", "virtual_pipeline", "sequence", "zero_stage")

# (tensor, pipeline); the rest of the processes is data parallel. The first two are those with a goal on eight GPUs.
MODEL_PARALLEL = ((1, 1), (2, 2), (2, 1), (4, 1), (1, 2), (1, 4))
# Layout on eight GPUs: the least share of one process's tokens/s that each process should reach.
GOALS = {"data=8": 0.93, "tensor=2,sequence=true,pipeline=2,data=2": 0.75}


def split(layout: str) -> dict[str, str]:
    """A layout's keys: comma-separated, those of `parallel` without that prefix, `data`, or any other of the recipe."""
    return dict(each.split("=", 1) for each in layout.split(",") if each)


def parse(layout: str) -> tuple[str, list[str], int]:
    """The layout, its keys as the recipe's, and how many processes it takes."""
    keys = split(layout)
    replicas = int(keys.pop("data", 1))
    world = replicas * math.prod(int(keys.get(key, 1)) for key in ("tensor", "context", "pipeline"))
    return layout, [f"parallel.{k}={v}" if k in SHORT else f"{k}={v}" for k, v in keys.items()], world


def fitting(processes: int) -> list[str]:
    """Layouts of all the processes that are a power of two, then of half of them, and so on down to two."""
    size = 1 << max(0, processes.bit_length() - 1)
    return [] if size < 2 else [*of_size(size), *fitting(size // 2)]


def of_size(processes: int) -> list[str]:
    """Data parallel with ZeRO 1, 2, 3; tensor with sequence parallel; pipelines, interleaved or not; tensor × pipeline.

    Those that matter most come first.
    """
    first, rest = [], []
    for tensor, pipeline in MODEL_PARALLEL:
        if processes % (tensor * pipeline):
            continue
        keys = [f"tensor={tensor}", "sequence=true"] if tensor > 1 else []
        keys += [f"pipeline={pipeline}"] if pipeline > 1 else []
        replicas = processes // (tensor * pipeline)
        layout = ",".join([*keys, f"data={replicas}"] if replicas > 1 else keys)
        (first if tensor == pipeline else rest).append(layout)
        if tensor == pipeline == 1:
            rest += [f"{layout},zero_stage=2", f"{layout},zero_stage=3"]
        elif tensor == 1:
            rest.append(f"{layout},virtual_pipeline=2")
    return first + rest


def micro_batch(layout: str, micro: int, samples: int) -> int:
    """Sequences of a micro-batch in a layout, from those of one process: tensor and context parallel ranks take as many
    for each of them. Halved while it does not divide a replica's share of the samples, or while a pipeline has fewer
    than eight micro-batches a stage, since those decide its bubble.
    """
    keys = split(layout)
    replicas, pipeline = int(keys.get("data", 1)), int(keys.get("pipeline", 1))
    micro *= int(keys.get("tensor", 1)) * int(keys.get("context", 1))
    own = samples // replicas
    while micro > 1 and (own % micro or (pipeline > 1 and own // micro < 8 * pipeline)):
        micro //= 2
    return micro


def bubble(pipeline: int, chunks: int, micro_batches: int) -> float:
    """Share of a step in which a stage of equal stages waits: Narayanan et al., arXiv 2104.04473, section 2.2."""
    waiting = (pipeline - 1) / chunks
    return waiting / (micro_batches + waiting)


def merge(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first rank's figures, with the largest memory of any."""
    line = dict(ranks[0])
    for key in ("start_gib", "peak_gib", "reserved_gib", "predicted_gib"):
        if key in line:
            line[key] = max(rank[key] for rank in ranks)
    return line


def loss_difference(losses: Iterable[float], others: Iterable[float]) -> float:
    """Largest relative difference of two layouts' losses; both have as many."""
    return max(abs(ours / theirs - 1) for ours, theirs in zip(losses, others, strict=True))


def goals(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each goal what its layout reached, or that it was not measured."""
    measured = {line["layout"]: line for line in lines if "share" in line}
    found = []
    for layout, goal in GOALS.items():
        line = measured.get(layout)
        reached = {"met": "not measured"} if line is None else {"share": line["share"], "met": line["share"] >= goal}
        micro_batches = {} if line is None else {"micro_batches": line["micro_batches"]}
        found.append({"layout": layout, "goal": goal, **reached, **micro_batches})
    return found


def emit(line: dict[str, Any], out: Path | None) -> None:
    """Print a line of JSON, and append it to the file if there is one."""
    text = json.dumps(line)
    print(text, flush=True)
    if out:
        with open(out, "a") as file:
            file.write(text + "\n")
