"""The passes of a step as one launch, a CUDA graph, for small models, whose launches take the host longer than the GPU.

Kernels are launched by the lengths of documents, which the host knows, and read all else on the device. So what a step
launches is the same as long as its micro-batches' documents have the same lengths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megahybrid.config.recording import replayed
from megahybrid.config.schema import Config
from megahybrid.errors import UserError
from megahybrid.parallel import groups
from megahybrid.training.logs import log
from megahybrid.training.step_report import StepReport
from megahybrid_kernels import Sequences

_MOST = 8  # graphs that are kept
_PATIENCE = 100  # steps after which it is said that there is none

Passes = Callable[[Sequence["Inputs"], "float | Tensor"], StepReport]


@dataclass(frozen=True)
class Inputs:
    """What the passes of one micro-batch read, on the device: see `Batch` and `Context`."""

    tokens: Tensor
    labels: Tensor
    sequences: Sequences
    dropout_keys: Tensor
    weights: Tensor | None

    def take(self, other: Inputs) -> None:
        """Be of another micro-batch, whose documents have the same lengths."""
        for name in ("tokens", "labels", "dropout_keys", "weights"):
            if (mine := getattr(self, name)) is not None:
                mine.copy_(getattr(other, name))


class Replay(Protocol):
    """Passes that were recorded."""

    def __call__(self) -> StepReport:
        """Do them again, on what their inputs are by now."""


class Graphs:
    """Passes of the last shapes of a step's micro-batches, each recorded when it came twice with no other new one
    between."""

    def __init__(self, device: torch.device, record: Callable[..., Replay] | None = None):
        """record: from passes without arguments to their replay; that of CUDA's graphs."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._record = record or self._capture
        self._recorded: dict[tuple, _Recorded] = {}
        self._last: tuple | None = None
        self._launched = 0

    @classmethod
    def of(cls, config: Config, device: torch.device) -> Graphs | None:
        """None where they are not asked for or cannot be: without a GPU, where passes wait for other processes or
        gather weights, and where lengths do not repeat."""
        return cls(device) if device.type == "cuda" and replayed(config, groups.world()[1]) else None

    @property
    def shapes(self) -> Iterable[tuple]:
        """Documents' lengths of every micro-batch, of the passes that are recorded, in the order of their last use."""
        return self._recorded.keys()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """The stream of all steps. Parameters' hooks are made on it, too, since what adds their gradients up stays on
        the stream that it was made on."""
        if self._stream is None:
            yield
            return
        default = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(default)
        with torch.cuda.stream(self._stream):
            yield
        default.wait_stream(self._stream)

    def run(self, inputs: Sequence[Inputs], divisor: float | Tensor, passes: Passes) -> StepReport:
        """What `passes(inputs, divisor)` does and gives, perhaps as one launch.

        passes: reads nothing that changes between steps but these and what changes in its place on the device.

        Raises UserError where they cannot be recorded.
        """
        shape = tuple(each.sequences.lengths for each in inputs)
        if found := self._recorded.pop(shape, None):
            self._recorded[shape] = found  # the last that is given up
            return found.again(inputs, divisor)
        known, self._last = shape == self._last, shape
        self._launched += 1
        if self._launched == _PATIENCE and not self._recorded and not known:
            log.warning(
                "train.cuda_graph has recorded nothing in %d steps: no two in a row had documents of the same lengths.",
                _PATIENCE,
            )
        report = passes(inputs, divisor)
        if known:
            # Kernels are compiled, and plans that the host makes for these lengths are with `inputs`, whose memory the
            # recorded passes read from now on.
            self._recorded[shape] = _Recorded(inputs, divisor, self._replay_of(lambda: passes(inputs, divisor)))
            log.info("Steps with documents like this one's are a CUDA graph from now on.")
            if len(self._recorded) > _MOST:
                del self._recorded[next(iter(self._recorded))]
        return report

    def _replay_of(self, passes: Callable[[], StepReport]) -> Replay:
        try:
            return self._record(passes)
        except RuntimeError as error:
            first = error
            while isinstance(first.__context__, RuntimeError):  # torch says last that recording failed, not of what
                first = first.__context__
            if isinstance(first, torch.OutOfMemoryError):
                raise first from error
            why = str(first).partition("\n")[0]
            raise UserError(f"The passes could not be recorded ({why}); set train.cuda_graph=false.") from error

    def _capture(self, passes: Callable[[], StepReport]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Threads that write checkpoints may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            report = passes()

        def replay() -> StepReport:
            graph.replay()
            report.renew()
            return report

        return replay


@dataclass(frozen=True)
class _Recorded:
    inputs: Sequence[Inputs]
    divisor: float | Tensor
    replay: Replay

    def again(self, inputs: Sequence[Inputs], divisor: float | Tensor) -> StepReport:
        for mine, other in zip(self.inputs, inputs, strict=True):
            mine.take(other)
        if isinstance(self.divisor, Tensor):
            self.divisor.copy_(divisor)
        return self.replay()
