"""Traces of single steps: what ran when, on the host and the GPU (torch.profiler)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megahybrid.config.schema import TraceConfig
from megahybrid.errors import UserError


class Tracing:
    """This process's traces, in Chrome's format (chrome://tracing, ui.perfetto.dev), a file a step."""

    def __init__(self, config: TraceConfig, folder: Path, rank: int, world: int, tell: Callable[[str], None]):
        """`folder` is made for the first trace; `tell` is told where it is. Raises UserError for a rank that the run
        does not have."""
        if config.steps and (beyond := [each for each in config.ranks if each >= world]):
            raise UserError(f"train.trace.ranks has {beyond[0]}, but processes are 0 to {world - 1}; change it.")
        self._steps = set(config.steps) if rank in config.ranks else set()
        self._folder, self._rank, self._tell = folder, rank, tell

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """What runs within, if this step is traced. A trace that cannot be written is told and left out."""
        if number not in self._steps:
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with profile(activities=activities, record_shapes=True) as found:
            yield
        path = self._folder / f"step_{number:08}-rank_{self._rank}.json.gz"
        part = path.with_name(f".{path.name.removesuffix('.json.gz')}.part.json.gz")  # torch packs what ends so
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(part))
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            self._tell(f"The trace of step {number} could not be written ({error}); the run goes on.")
        else:
            self._tell(f"A trace of step {number}: {path}")
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
