"""Decoding at fixed addresses: one token of every sequence through the whole model, recorded once as a CUDA graph.

A step of decoding is some hundred small kernels, which take the host longer to launch than a GPU to run at small
batches. A graph launches them all at once, but reads and writes the addresses it was recorded with: tokens, positions,
logits and the mixers' states therefore stay where they are, and are updated in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megahybrid.inference import states as state_tools
from megahybrid.model.context import Context
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid_kernels import Sequences
from megahybrid_kernels.backend import takes_triton


class DecodeStep:
    """A step without a graph: what the graph records.

    Attributes:
        tokens: int64 `[sequences]`, on the device; the step reads it.
        positions: int64 `[sequences]`, on the device, those of `tokens`; the step adds 1.
        logits: `[sequences, vocabulary]` in the model's dtype, what follows `tokens`; None before the first step.
    """

    def __init__(self, model: Stack, states: dict[int, Any], positions: Sequence[int]):
        """`states`: those of sequences that have read `positions` tokens; they are overwritten."""
        self._model, self._states, self._advanced = model, states, 0
        device = next(model.parameters()).device
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        self.tokens = torch.zeros_like(self.positions)
        self.logits: Tensor | None = None
        self._lengths = (1,) * len(positions)
        self._borders = torch.arange(len(positions) + 1, dtype=torch.int32, device=device)
        self._room = state_tools.room(states)

    @property
    def fits(self) -> bool:
        """Whether the caches have room for one more token."""
        return self._room is None or self._advanced < self._room

    @property
    def states(self) -> dict[int, Any]:
        """The mixers' states after all steps so far."""
        if self._advanced and self._room is not None:  # else no cache grows, and all stay as they are
            self._states = state_tools.advance(self._states, self._advanced)
            self._room = state_tools.room(self._states)
        self._advanced = 0
        return self._states

    def run(self) -> Tensor:
        """Read `tokens`; returns `logits`, which hold until the next step. Only where `fits`."""
        self._forward(self.states)
        self._advanced += 1
        return self.logits

    @torch.inference_mode()
    def _forward(self, states: dict[int, Any]) -> None:
        # New each time, because it keeps what it derives from the positions.
        sequences = Sequences(self._borders, self._lengths, self.positions)
        out = self._model(self.tokens, Context(sequences, in_place=True), states=states)
        state_tools.take_over(states, out.states)
        logits = groups.gather_tensor_parallel(self._model.logits(out.hidden), 1)
        self.logits = logits if self.logits is None else self.logits.copy_(logits)
        self.positions += 1


class DecodeGraph(DecodeStep):
    """The same, replayed. A step like it must have run before: recording can neither compile nor tune anything."""

    def __init__(self, model: Stack, states: dict[int, Any], positions: Sequence[int]):
        super().__init__(model, states, positions)
        self._graph = torch.cuda.CUDAGraph()
        # Relaxed: a library may load code at its first use in the recording stream, and other threads use the device.
        with torch.cuda.graph(self._graph, capture_error_mode="relaxed"):
            self._forward(states)

    def run(self) -> Tensor:
        self._graph.replay()
        self._advanced += 1
        return self.logits


def takes_graph(model: Stack) -> bool:
    """Whether a step of this model can be recorded: on one GPU, in a precision for which no op needs the host."""
    return takes_triton(next(model.parameters())) and groups.tensor_parallel()[1] == 1
