"""What policies keep, against sorting all tokens that have left the window; in pieces as in one pass."""

import pytest
import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.mixers.lte.policies import POLICIES, KeyNorm, Oracle, Random, Recency, Scored, swapped
from megahybrid.model.context import Context
from megahybrid.parallel import groups
from megahybrid_kernels import Sequences
from tests.inference.oracle import BUFFER, WINDOW, in_pieces, tokens, whole
from tests.model import tiny

SINKS, LONG = 2, 70
WANTED = [3, 20, 21, 40, 41]


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [1, 11])
def test_pieces_give_what_one_pass_gives(name, size):
    model, rows = tiny.model("LGL"), [tokens(LONG, seed=1), tokens(LONG, seed=2)]
    with swapped(model, name, [WANTED]):
        expected = [whole(model, row) for row in rows]
    plain = whole(model, rows[0])
    assert name == "learned" or (plain - expected[0]).abs().max() > 1e-3
    pieces = [[min(size, LONG - at)] * 2 for at in range(0, LONG, size)]
    with swapped(model, name, [WANTED] * 2):
        found = in_pieces(model, rows, pieces)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-9
    assert torch.equal(whole(model, rows[0]), plain)  # the router is back


def held(model, ids):
    states = model.initial_states(1)
    with torch.no_grad():
        states = model(torch.tensor(ids), Context(Sequences.of([len(ids)])), states=states).states
    found = model.layers["0"].mixer.held(states[0])[0]
    return [sorted(each for each in head if each >= 0) for head in found.tolist()]


def expected(scores):
    """The ring's tokens, and of those that the next query no longer finds in the window the best, of which the ring
    has one."""
    left = range(LONG - WINDOW + 1)
    order = sorted(
        (each for each in left if each < SINKS or scores[each] > 0), key=lambda j: (j >= SINKS, -scores[j], j)
    )
    return sorted({*order[:BUFFER], *range(LONG - WINDOW, LONG)})


def scored(policy, state=None):
    norms = torch.arange(LONG * 2).reshape(LONG, 2).sin().abs()
    return policy.scores(Scored(torch.zeros(LONG, dtype=torch.int64), torch.arange(LONG), norms, 0, state)), norms


@pytest.mark.parametrize("name", ["recency", "random", "oracle"])
def test_the_best_tokens_are_held(name):
    policy = {"recency": Recency, "random": Random}[name]() if name != "oracle" else Oracle([WANTED])
    scores, _ = scored(policy, policy.state(1))
    model = tiny.model("L")
    with swapped(model, name, [WANTED]):
        assert held(model, tokens(LONG)) == [expected(scores[:, head].tolist()) for head in range(2)]


def test_scores_are_in_the_order_that_their_names_say():
    assert scored(Recency())[0][:, 0].diff().gt(0).all()
    scores, norms = scored(KeyNorm())
    assert torch.equal(scores[:, 1].argsort(), norms[:, 1].argsort(descending=True))
    wanted, _ = scored(Oracle([WANTED]), Oracle([WANTED]).state(1))
    assert wanted[:, 0].nonzero().flatten().tolist() == WANTED
    drawn, _ = scored(Random())
    assert (drawn > 0).all() and len(drawn.unique()) == 2 * LONG and abs(drawn.mean() - 0.5) < 0.1


def test_the_norm_is_the_keys(monkeypatch):
    """Of a whole pass; that pieces find the same is shown above."""
    seen = []
    monkeypatch.setattr(KeyNorm, "scores", lambda self, each: seen.append(each.norms) or 1 / (1 + each.norms))
    model, ids = tiny.model("L"), tokens(LONG)
    with swapped(model, "key_norm", []):
        whole(model, ids)
    layer, x = model.layers["0"], model.embedding(torch.tensor(ids))
    keys = (layer.mixer_norm(x, None)[0] @ layer.mixer.k_proj.weight.T).reshape(LONG, 2, 8)
    assert (seen[0] - keys.pow(2).sum(2).sqrt()).abs().max() < 1e-9


@pytest.mark.parametrize("pattern", ["S", "F"])
def test_what_attention_holds(pattern):
    kept = range(LONG) if pattern == "F" else range(LONG - 7, LONG)
    assert held(tiny.model(pattern), tokens(LONG)) == [list(kept)] * 2
