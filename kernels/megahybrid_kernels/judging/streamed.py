"""Cases of prefill in pieces and decode: every call of an op goes on from the state that the last one left."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megahybrid_kernels.judging.case import Case, Inputs, Make, Op
from megahybrid_kernels.sequences import Sequences

Rounds = tuple[tuple[int, ...], ...]
"""Tokens of each sequence in each call."""

STEPS: Rounds = ((1, 1, 1),) * 80
# Prompts that fit a window, and longer ones: whole, which begin here; in pieces, beside one that decodes; decode.
SHORT: Rounds = ((70, 1, 9), (3, 5, 1), *((1, 1, 1),) * 4)
PIECES: Rounds = ((2500, 70), (1100, 1), (65, 130), *((1, 1),) * 20)


@dataclass(frozen=True)
class Streamed:
    """An op with a state.

    Attributes:
        op: its name in the table, less `_step` or `_prefill`.
        module, function, reference: as of `Case`.
        make: inputs of so many tokens; what has not a row a token is passed to every call.
        first: the state of so many sequences before their first token; `nothing` where the op needs none.
        call: the op on inputs, borders and state; output and next state.
        late: rows of each sequence whose outputs mean nothing.
    """

    op: str
    module: str
    function: str
    make: Callable[[int], Make]
    first: Callable[[Inputs, int], Any]
    call: Callable[[Op, Inputs, Sequences, Any], tuple[Tensor, Any]]
    reference: str | None = None
    late: int = 0


def nothing(x: Inputs, count: int) -> None:
    """`Streamed.first` of ops that begin without a state."""


def many_steps(heads: int) -> Rounds:
    """Of so many sequences that none of a head's work is split."""
    return ((1,) * max(64, -(-512 // heads)),) * 30


def streamed_case(streamed: Streamed, kind: str, rounds: Rounds, variant: str = "") -> Case:
    """The outputs of all calls; `kind` is "step" or "prefill"."""
    tokens = sum(map(sum, rounds))
    return Case(
        op=f"{streamed.op}_{kind}",
        module=streamed.module,
        function=streamed.function,
        shape=f"calls={len(rounds)} sequences={len(rounds[0])} tokens={tokens}",
        lengths=(tokens,),
        make=streamed.make(tokens),
        call=partial(_call_by_call, streamed, rounds),
        backward=False,
        reference=streamed.reference,
        variant=variant,
    )


def _call_by_call(streamed: Streamed, rounds: Rounds, op: Op, x: Inputs, whole: Sequences) -> Tensor:
    device, count, outputs = whole.cu_seqlens.device, len(rounds[0]), []
    # As in generation, which lets an op write into its state; references offer no such choice.
    op = partial(op, in_place=True) if "in_place" in inspect.signature(op).parameters else op
    state, read, row = streamed.first(x, count), [0] * count, 0
    for lengths in rounds:
        rows = slice(row, row + sum(lengths))
        now = {name: each[rows] if len(each) == whole.tokens else each for name, each in x.items()}
        # Without starts an op knows that all begin here, for which it has faster ways.
        starts = torch.tensor(read, device=device) if any(read) else None
        sequences = Sequences.of(lengths, device, starts)
        output, state = streamed.call(op, now, sequences, state)
        early = sequences.positions < streamed.late
        outputs.append(output.masked_fill(early.view(-1, *(1,) * (output.dim() - 1)), 0))
        row, read = rows.stop, [old + new for old, new in zip(read, lengths, strict=True)]
    return torch.cat(outputs)
