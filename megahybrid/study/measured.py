"""GPU hours, as the runs' own files measure them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megahybrid.study.cells import RUNS
from megahybrid.training import attempts
from megahybrid.training.run_directory import RunDirectory


class _Start(NamedTuple):
    """Of the run of that identity, from one time to another, in seconds."""

    run: str
    begin: float
    end: float
    processes: int


def gpu_hours() -> dict[str, float]:
    """By identity, of all starts of all studies' runs so far: each process's hours, of runs that train at once on the
    same GPUs of one machine, or in one job, their parts of the time that they share."""
    places: dict[tuple[str | None, ...], list[_Start]] = defaultdict(list)
    for file in RUNS.glob("*/attempts.jsonl"):
        for start, lasted in attempts.lasted(RunDirectory(file.parent)):
            begin, place = start["time"], (start["job"], start["nodes"], start.get("gpus"))
            places[place].append(_Start(file.parent.name, begin, begin + lasted, start["processes"]))
    hours: dict[str, float] = defaultdict(float)
    for start, part in itertools.chain.from_iterable(_parts(starts) for starts in places.values()):
        hours[start.run] += start.processes * part / 3600
    return hours


def _parts(starts: Sequence[_Start]) -> list[tuple[_Start, float]]:
    """Each with its seconds, of which those that several share are divided among them."""
    times = np.unique([time for start in starts for time in (start.begin, start.end)])
    at_once = sum((start.begin <= times[:-1]) & (times[1:] <= start.end) for start in starts)
    so_far = np.concatenate([[0.0], np.cumsum(np.diff(times) / np.maximum(at_once, 1))])
    places = [np.searchsorted(times, (start.begin, start.end)) for start in starts]
    return [(start, so_far[end] - so_far[begin]) for start, (begin, end) in zip(starts, places, strict=True)]
