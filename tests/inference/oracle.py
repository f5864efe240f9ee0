"""The model without any cache: what every way of generating is compared with."""

import contextlib
from unittest import mock

import torch

from megahybrid.mixers.lte.module import Router
from megahybrid.model.context import Context
from megahybrid_kernels import Sequences
from tests.model import tiny

PATTERNS = ["G", "L", "S", "F", "N", "GLSFN"]
WINDOW = 8  # keys, self included, of tiny's S and L alike
BUFFER = 5


def tokens(count, seed=0):
    """A list of random token ids."""
    return torch.randint(0, tiny.VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole(model, ids):
    """Logits `[tokens, vocabulary]` of one pass over all of them."""
    with torch.no_grad():
        out = model(torch.tensor(ids), Context(Sequences.of([len(ids)])))
        return model.logits(out.hidden)


def in_pieces(model, rows, pieces):
    """The same for several sequences whose tokens come in pieces, with the mixers' states handed on.

    rows: a list of ids for each sequence; pieces: `[rounds][sequences]`, how many tokens of each a round has.
    """
    states, seen, found = model.initial_states(len(rows)), [0] * len(rows), [[] for _ in rows]
    for lengths in pieces:
        ids = [i for row, at, n in zip(rows, seen, lengths, strict=True) for i in row[at : at + n]]
        sequences = Sequences.of(lengths, starts=torch.tensor(seen))
        with torch.no_grad():
            out = model(torch.tensor(ids), Context(sequences), states=states)
            parts = model.logits(out.hidden).split(lengths)
        states = out.states
        seen = [at + n for at, n in zip(seen, lengths, strict=True)]
        for kept, part in zip(found, parts, strict=True):
            kept.append(part)
    return [torch.cat(parts) for parts in found]


@contextlib.contextmanager
def router_logits(seen):
    """Adds `[tokens, heads]` of every LTE layer to the list `seen`, in order of depth."""

    def watched(original):
        def forward(self, *arguments, **named):
            scores, *rest = original(self, *arguments, **named)
            seen.append(torch.logit(scores.double() + 0.5))
            return scores, *rest

        return forward

    with contextlib.ExitStack() as stack:
        for name in ("forward", "streamed"):
            stack.enter_context(mock.patch.object(Router, name, watched(getattr(Router, name))))
        yield
