"""Samples with their right answers, read in pieces on the mixers' states: memory is bounded whatever their length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megahybrid.inference import states as state_tools
from megahybrid.inference.batch import share
from megahybrid.model.context import Context
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid.tasks import Answer, Sample
from megahybrid_kernels import Sequences
from megahybrid_kernels.precision import at_least_fp32

_ROWS = 1024  # of logits at once
_MOST_SLOTS = 2**25  # of states, looked through at once


class Reading(NamedTuple):
    """What a model makes of a sample's answers.

    Attributes:
        nll: `[tokens]`, of the tokens of answers in nats, nan elsewhere.
        found: int64 `[tokens]`, the likeliest token in the place of each of them.
        kept: `[answers]`, share of the heads of all layers with keys whose state holds a needle when the answer is
            asked for; nan where no layer has keys, or nothing holds the answer.
    """

    nll: NDArray[np.float64]
    found: NDArray[np.int64]
    kept: NDArray[np.float64]


@torch.inference_mode()
def read(model: Stack, samples: Sequence[Sample], choices: int, prefill_chunk: int) -> list[Reading]:
    """Read samples together, at most `prefill_chunk` tokens a step; called alike on all tensor parallel ranks.

    choices: tokens that may be an answer are below it.
    """
    device = next(model.parameters()).device
    readings = [
        Reading(np.full(len(each.tokens), np.nan), np.zeros(len(each.tokens), np.int64), np.zeros(len(each.answers)))
        for each in samples
    ]
    states, rows, at = model.initial_states(len(samples)), list(range(len(samples))), [0] * len(samples)
    with_needles = any(answer.needles for each in samples for answer in each.answers)
    with_keys = with_needles and any(held is not None for held in _held(model, states))
    # A piece ends before the query of an answer: what that query finds in the state is what it sees beside itself.
    ends = [
        sorted({int(each.asked[-1]), *(answer.span.begin - 1 for answer in each.answers if with_keys)})
        for each in samples
    ]
    counts = [len(each.answers) for each in samples]
    heads = torch.zeros(sum(counts), 2, dtype=torch.float64, device=device)
    # By sample and where an answer's query stands: its number over all samples, and itself.
    numbers = itertools.count()
    asking = [{answer.span.begin - 1: (next(numbers), answer) for answer in each.answers} for each in samples]
    while rows:
        waiting = [next(end for end in ends[row] if end > at[row]) - at[row] for row in rows]
        pieces = share(waiting, prefill_chunk)
        spans = [(row, at[row], at[row] + piece) for row, piece in zip(rows, pieces, strict=True)]
        ids = np.concatenate([samples[row].tokens[begin:end] for row, begin, end in spans])
        starts = torch.tensor([begin for _, begin, _ in spans], device=device) if any(at[row] for row in rows) else None
        context = Context(Sequences.of(pieces, device, starts), in_place=True)
        out = model(torch.from_numpy(ids).to(device), context, states=states)
        states = out.states
        _score(model, out.hidden, spans, samples, readings, choices)
        for row, _, end in spans:
            at[row] = end
        if with_keys:
            asked = [(place, *asking[row][at[row]]) for place, row in enumerate(rows) if at[row] in asking[row]]
            _count_heads(heads, _held(model, states), asked)
        staying = [place for place, row in enumerate(rows) if at[row] < ends[row][-1]]
        if len(staying) < len(rows):
            states, rows = state_tools.select(states, staying), [rows[place] for place in staying]
    holding, all_heads = groups.sum_over_all(heads).unbind(1)
    for reading, kept in zip(readings, (holding / all_heads).split(counts), strict=True):
        reading.kept[:] = kept.cpu().numpy()
    return readings


def _score(
    model: Stack,
    hidden: Tensor,
    spans: Sequence[tuple[int, int, int]],
    samples: Sequence[Sample],
    readings: Sequence[Reading],
    choices: int,
) -> None:
    """Put what follows the tokens of a step, where an answer's token does, into the readings."""
    first, places, labels, targets = 0, [], [], []
    for row, begin, end in spans:
        asked = samples[row].asked
        asked = asked[(asked > begin) & (asked <= end)]
        places.append(asked - 1 - begin + first)
        labels.append(samples[row].tokens[asked])
        targets.append((row, asked))
        first += end - begin
    index = torch.from_numpy(np.concatenate(places)).to(hidden.device)
    right = torch.from_numpy(np.concatenate(labels)).to(hidden.device)
    nll, found = [], []
    for some, label in zip(index.split(_ROWS), right.split(_ROWS), strict=True):
        logits = at_least_fp32(groups.gather_tensor_parallel(model.logits(hidden[some]), 1))
        nll.append(F.cross_entropy(logits, label, reduction="none"))
        found.append(logits[:, :choices].argmax(1))
    counts = [len(asked) for _, asked in targets]
    for (row, asked), one, other in zip(
        targets, torch.cat(nll).split(counts), torch.cat(found).split(counts), strict=True
    ):
        readings[row].nll[asked], readings[row].found[asked] = one.cpu().numpy(), other.cpu().numpy()


def _held(model: Stack, states: dict[int, Any]) -> list[Tensor | None]:
    """The positions that each layer's state holds, `[sequences, heads of this rank, slots]`, -1 for a blank."""
    return [model.layers[str(layer)].mixer.held(state) for layer, state in states.items()]


def _count_heads(heads: Tensor, held: Sequence[Tensor | None], asked: Sequence[tuple[int, int, Answer]]) -> None:
    """Add to `heads`, `[answers, 2]`, how many of this rank hold all tokens of some needle, and how many there are.

    asked: of answers that are asked for now, the place of their sample in the states, their number, and they.
    """
    device, asked = heads.device, [each for each in asked if each[2].needles]
    if not asked:
        return
    needles = [
        (row, place, answer.span.begin - 1, *needle)
        for row, (place, _, answer) in enumerate(asked)
        for needle in answer.needles
    ]
    row, place, query, begin, end = torch.tensor(needles, device=device).T
    numbers = torch.tensor([number for _, number, _ in asked], device=device)
    wanted = end - begin - ((begin <= query) & (query < end)).long()  # a query sees itself
    for positions in held:
        if positions is None:
            continue
        whole = []
        for some in torch.arange(len(needles), device=device).split(
            max(1, _MOST_SLOTS // max(1, positions[0].numel()))
        ):
            here, (first, after) = positions[place[some]], (x[some, None, None] for x in (begin, end))
            whole.append(((here >= first) & (here < after)).sum(2) == wanted[some, None])  # each stands there once
        holding = torch.zeros(len(asked), positions.shape[1], device=device).index_add_(
            0, row, torch.cat(whole).float()
        )
        heads[numbers, 0] += (holding > 0).sum(1)
        heads[numbers, 1] += positions.shape[1]
