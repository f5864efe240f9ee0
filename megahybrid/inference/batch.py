"""Sequences that are read and continued together, on the one state that the mixers have for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megahybrid.inference import states
from megahybrid.inference.decode import DecodeGraph, takes_graph
from megahybrid.model.context import Context
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid_kernels import Sequences
from megahybrid_kernels.backend import takes_triton


class Batch:
    """Sequences at any place in their prompts or texts: every step takes at least one token of each.

    Prompts are read in pieces, so that the memory of a step is bounded whatever their lengths, and beside them others
    go on token by token. Sequences may join and leave between steps. Called alike on all tensor parallel ranks.
    """

    def __init__(self, model: Stack, prefill_chunk: int):
        """`prefill_chunk`: tokens that a step takes, over all sequences, if there are not more sequences than that."""
        self._model, self._prefill_chunk = model, prefill_chunk
        self._states: dict[int, Any] | None = None  # while nothing is read
        self._waiting: list[list[int]] = []
        self._read: list[int] = []
        self._graph: DecodeGraph | None = None
        self._decoded = False  # whether the last step was one of decoding, of these sequences

    @property
    def count(self) -> int:
        """Number of sequences."""
        return len(self._waiting)

    @property
    def state_bytes(self) -> int:
        """Memory that the sequences' states hold on this rank, bytes."""
        held = self._graph.states if self._graph else self._states
        return states.size_in_bytes(held) if held else 0

    def add(self, prompts: Sequence[Sequence[int]]) -> None:
        """Sequences that join as the last rows; each has at least one token."""
        self._leave_graph()
        if self._states is not None:
            self._states = states.join(self._states, self._model.initial_states(len(prompts)))
        self._waiting += [list(prompt) for prompt in prompts]
        self._read += [0] * len(prompts)

    def keep(self, rows: Sequence[int]) -> None:
        """Only the sequences `rows` stay, in this order; one that comes more than once goes on as so many."""
        if list(rows) == list(range(self.count)):
            return
        self._leave_graph()
        self._states = states.select(self._states, rows) if rows and self._states else None
        self._waiting = [list(self._waiting[row]) for row in rows]
        self._read = [self._read[row] for row in rows]

    def extend(self, row: int, token: int) -> None:
        """Put a token behind the others of a sequence."""
        self._waiting[row].append(token)

    @torch.inference_mode()
    def step(self) -> tuple[list[int], Tensor | None]:
        """Read the next piece of every sequence, each of which has a token waiting.

        Returns the rows that have none left, and what follows their last token: logits `[rows, vocabulary]` in the
        model's dtype, the same on all ranks, which hold until the next step; None when there is no such row.
        """
        one_each = self._states is not None and all(len(waiting) == 1 for waiting in self._waiting)
        decoding = one_each and takes_graph(self._model)
        if decoding and self._decoded and self._has_room():
            return self._replay()
        self._leave_graph()
        self._decoded = decoding  # the first such step compiles what the graph of the second holds
        pieces = share(list(map(len, self._waiting)), self._prefill_chunk)
        tokens = [token for waiting, piece in zip(self._waiting, pieces, strict=True) for token in waiting[:piece]]
        device = self._model.layers[next(iter(self._model.layers))].mixer_norm.weight.device
        # Without starts the mixers know that all begin here, for which they have faster ways.
        starts = torch.tensor(self._read, device=device) if any(self._read) else None
        sequences = Sequences.of(pieces, device, starts)
        context = Context(sequences, keep_states=True, in_place=True)
        out = self._model(torch.tensor(tokens, device=device), context, states=self._states)
        self._states = out.states
        self._read = [read + piece for read, piece in zip(self._read, pieces, strict=True)]
        self._waiting = [waiting[piece:] for waiting, piece in zip(self._waiting, pieces, strict=True)]
        rows = [row for row, waiting in enumerate(self._waiting) if not waiting]
        if not rows:
            return rows, None
        last = torch.tensor([sequences.borders[row + 1] - 1 for row in rows], device=device)
        return rows, groups.gather_tensor_parallel(self._model.logits(out.hidden[last]), 1)

    def _replay(self) -> tuple[list[int], Tensor]:
        """`step` where every sequence has one token, through a graph."""
        if self._graph is None:
            self._graph = DecodeGraph(self._model, self._states, self._read)
        tokens = torch.tensor([waiting[0] for waiting in self._waiting])
        self._graph.tokens.copy_(tokens)
        logits = self._graph.run()
        self._read = [read + 1 for read in self._read]
        self._waiting = [[] for _ in self._waiting]
        return list(range(self.count)), logits

    def _has_room(self) -> bool:
        return self._graph.fits if self._graph else states.room(self._states) != 0

    def _leave_graph(self) -> None:
        """The sequences are about to change, or their memory: what was recorded holds no longer."""
        self._decoded = False
        if self._graph is not None:
            self._states, self._graph = self._graph.states, None


def suitable_chunk(model: Stack) -> int:
    """Tokens of a step of prefill: a GPU reads whole prompts fastest, but a step's memory grows with its tokens; on a
    CPU each query of a piece is held against all keys of the piece before it."""
    return 65536 if takes_triton(next(model.parameters())) else 2048


def share(waiting: Sequence[int], tokens: int) -> list[int]:
    """How many of its waiting tokens each sequence gets in a step: at least one, then as even as they need it, `tokens`
    together unless there are more sequences than that."""
    pieces, spare = [1] * len(waiting), max(tokens - len(waiting), 0)
    by_need = sorted(range(len(waiting)), key=waiting.__getitem__)
    for done, row in enumerate(by_need):
        extra = min(waiting[row] - 1, spare // (len(waiting) - done))
        pieces[row] += extra
        spare -= extra
    return pieces
