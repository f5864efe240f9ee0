"""Answers read in pieces against one pass over a whole sample, and what states hold against what they were given."""

import numpy as np
import pytest
import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.evaluation.forced import read
from megahybrid.parallel import groups
from megahybrid.tasks import Answer, Sample, Span
from tests.inference.oracle import tokens, whole
from tests.model import tiny

CHOICES = tiny.VOCAB - 3


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


def sample(length, spans, needles=((1, 2),), seed=0):
    ids = np.array(tokens(length, seed=seed))
    needles = tuple(Span(*needle) for needle in needles)
    return Sample(ids, spans[0][0], [Answer(Span(*span), needles) for span in spans])


SAMPLES = [
    sample(60, [(20, 21), (21, 24), (40, 43)], seed=1),
    sample(31, [(29, 31)], seed=2),
    sample(90, [(2, 3), (88, 89)], seed=3),
]


@pytest.mark.parametrize("chunk", [3, 17, 1000])
@pytest.mark.parametrize("pattern", ["G", "GLSFN"])
def test_pieces_of_any_size_give_what_one_pass_gives(pattern, chunk):
    model = tiny.model(pattern)
    for each, reading in zip(SAMPLES, read(model, SAMPLES, CHOICES, chunk), strict=True):
        logits = whole(model, each.tokens)[:-1]
        nll = -logits.log_softmax(1)[torch.arange(len(logits)), torch.tensor(each.tokens[1:])]
        asked = each.asked
        assert np.abs(reading.nll[asked] - nll[asked - 1].numpy()).max() < 1e-9
        assert np.isnan(np.delete(reading.nll, asked)).all()
        assert (reading.found[asked] == logits[asked - 1, :CHOICES].argmax(1).numpy()).all()


def held_places(step, heads):
    """A layer of so many heads, each of which holds every `step`-th token."""

    def held(state):
        width = max(*state.lengths, 1)
        places = torch.full((state.count, heads, width), -1)
        for row, length in enumerate(state.lengths):
            kept = torch.arange(0, length, step)
            places[row, :, width - len(kept) :] = kept
        return places

    return held


@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_share_of_heads_that_hold_a_needle_is_that_at_the_query(chunk):
    model = tiny.model("FGF")
    model.layers["0"].mixer.held = held_places(2, 2)
    model.layers["2"].mixer.held = held_places(3, 1)
    found = read(
        model,
        [
            sample(50, [(30, 31), (31, 33)], [(12, 13)]),  # both layers
            sample(45, [(40, 41)], [(3, 4), (8, 9)]),  # a needle in each
            sample(40, [(20, 21)], [(4, 6)]),  # not all of it
            sample(
                45, [(16, 17), (17, 18), (44, 45)], [(16, 17)]
            ),  # not there yet at the first, itself the query of the second
        ],
        CHOICES,
        chunk,
    )
    assert [each.kept.round(6).tolist() for each in found] == [
        [1, 1], [1], [0], [0, 1, round(2 / 3, 6)],
    ]  # fmt: skip


def test_without_keys_nothing_is_said_of_them():
    (found,) = read(tiny.model("G"), SAMPLES[:1], CHOICES, 1000)
    assert np.isnan(found.kept).all()
