"""What policies keep, against sorting all tokens that have left the window; in pieces as in one pass."""

import pytest
import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.inference.batch import Batch
from megahybrid.mixers.kind import LEARNED
from megahybrid.mixers.lte import LTEKind
from megahybrid.mixers.lte.policies import Random
from megahybrid.model.context import Context
from megahybrid.model.mixer import swapped
from megahybrid.model.stack import build
from megahybrid.parallel import groups
from megahybrid_kernels import Sequences
from tests.inference.oracle import BUFFER, WINDOW, in_pieces, tokens, whole
from tests.model import tiny

SINKS, LONG = 2, 70
POLICIES = (LEARNED, *LTEKind.policies)
WANTED = [3, 20, 21, 40, 41]


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [1, 11])
def test_pieces_and_packed_documents_give_what_one_pass_gives(name, size):
    model, rows, wanted = tiny.model("LGL"), [tokens(LONG, seed=1), tokens(LONG + 9, seed=2)], [WANTED, [7, 8]]
    expected = []
    for number, (row, positions) in enumerate(zip(rows, wanted, strict=True)):
        with swapped(model, name, [positions], [number]):
            expected.append(whole(model, row))
    plain = whole(model, rows[0])
    assert name == "learned" or (plain - expected[0]).abs().max() > 1e-3
    pieces = [[4, 13], *([min(size, LONG - at)] * 2 for at in range(4, LONG, size))]
    with swapped(model, name, wanted, [0, 1]):
        found = in_pieces(model, rows, pieces)
        with torch.no_grad():
            packed = model(torch.tensor(rows[0] + rows[1]), Context(Sequences.of([LONG, LONG + 9])))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-9
    assert (model.logits(packed.hidden) - torch.cat(expected)).abs().max() < 1e-9
    assert torch.equal(whole(model, rows[0]), plain)  # the router is back


def held(model, ids):
    states = model.initial_states(1)
    with torch.no_grad():
        states = model(torch.tensor(ids), Context(Sequences.of([len(ids)])), states=states).states
    found = model.layers["0"].mixer.held(states[0])[0]
    return [sorted(each for each in head if each >= 0) for head in found.tolist()]


def expected(scores):
    """What the next query finds: of those that are not in its window the best, and its window."""
    left = range(LONG - WINDOW + 1)
    order = sorted(
        (each for each in left if each < SINKS or scores[each] > 0), key=lambda j: (j >= SINKS, -scores[j], j)
    )
    return sorted({*order[:BUFFER], *range(LONG - WINDOW + 1, LONG)})


def projected(model, ids):
    """q and k of the first layer, `[tokens, heads, head_dim]`, rotated by hand."""
    layer, x = model.layers["0"], model.embedding(torch.tensor(ids))
    x = layer.mixer_norm(x, None)[0].squeeze(1)
    angles = torch.arange(len(ids))[:, None] / layer.mixer.theta ** (torch.arange(4).double() / 4)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    for weight in (layer.mixer.q_proj.weight, layer.mixer.k_proj.weight):
        rows = (x @ weight.T).unflatten(-1, (-1, 8))
        turned = torch.complex(rows[..., :4], rows[..., 4:]) * turn
        yield torch.cat([turned.real, turned.imag], -1).detach()


def by_hand(name, model, ids):
    """`[tokens, kv heads]`: scores in the order of the real ones."""
    q, k = projected(model, ids)
    scores = torch.zeros(LONG, 2, dtype=torch.float64)
    if name == "recency":
        scores += torch.arange(1, LONG + 1)[:, None]
    elif name == "key_norm":
        scores += (100 - k.square().sum(-1)).round(decimals=9)  # those of a token are equal wherever it stands
    elif name == "oracle":
        scores[WANTED] = 1
    else:
        for query in range(LONG):
            window = slice(max(0, query - WINDOW + 1), query + 1)
            for head in range(4):
                logits = k[window, head // 2] @ q[query, head] / 8**0.5
                scores[window, head // 2] += logits.exp() / logits.exp().sum()
    return scores


@pytest.mark.parametrize("name", ["recency", "key_norm", "attention_mass", "oracle"])
def test_the_best_tokens_are_held(name):
    model, ids = tiny.model("L"), tokens(LONG, seed=3)
    scores = by_hand(name, model, ids)
    with swapped(model, name, [WANTED]):
        assert held(model, ids) == [expected(scores[:, head].tolist()) for head in range(2)]


def test_recency_is_a_longer_window():
    settings = tiny.config("GLGL")
    settings.model.lte.sink_size = 0
    model = build(settings, "cpu", torch.float64)
    settings = tiny.config("GSGS")
    settings.model.attention.window_size = WINDOW + BUFFER
    window = build(settings, "cpu", torch.float64)
    window.load_state_dict({name: value for name, value in model.state_dict().items() if ".router." not in name})
    ids = tokens(LONG, seed=5)
    with swapped(model, "recency", []):
        assert (whole(model, ids) - whole(window, ids)).abs().max() < 1e-9


def test_random_scores_are_spread_and_of_sequence_layer_and_head():
    """On a rank that has the second head only, too."""
    one, other = (tiny.model("LL").layers[name].mixer for name in "01")
    sequences = Sequences.of([LONG] * 3)

    def drawn(layer, heads):
        k, policy = torch.zeros(3 * LONG, heads, 8), Random(layer, [5, 6, 5])
        return policy.scores(k, (k, k), sequences, policy.state(3))[0]

    both = drawn(other, 2)
    first, second, third = both.split(LONG)
    assert torch.equal(first, third) and not (first == second).any()
    assert len(both.unique()) == 4 * LONG and (both > 0).all()
    assert abs(both.mean() / 2**24 - 0.5) < 0.1
    assert not (drawn(one, 2) == both).any()
    other.first_head = 1
    assert torch.equal(drawn(other, 1), both[:, 1:])


def test_an_oracle_of_other_sequences_is_refused():
    model = tiny.model("L")
    with swapped(model, "oracle", [WANTED]), pytest.raises(ValueError, match="knows 1 sequences, but 2 begin"):
        model.initial_states(2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_under_a_policy(name):
    """On a GPU where there is one, by its kernels and in a graph: a prompt in pieces beside one that decodes, then both
    decode."""
    rows, prompts, wanted = [tokens(60, seed=n) for n in (5, 6)], [2, 40], [[5, 6, 12], [1, 9, 20]]
    expected = []
    for number, (row, positions) in enumerate(zip(rows, wanted, strict=True)):
        double = tiny.model("L")
        with swapped(double, name, [positions], [number]):
            expected.append(whole(double, row))
    model = tiny.model("L", dtype=torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    with swapped(model, name, wanted, [0, 1]):
        batch, read = Batch(model, 9), list(prompts)
        batch.add([row[:n] for row, n in zip(rows, prompts, strict=True)])
        while max(read) < 60:
            done, logits = batch.step()
            for row, each in zip(done, logits, strict=True):
                assert (each.cpu() - expected[row][read[row] - 1]).abs().max() < 1e-4
                batch.extend(row, rows[row][read[row]])
                read[row] += 1
    assert min(read) > 20


@pytest.mark.parametrize("pattern", ["S", "F"])
def test_what_attention_holds(pattern):
    kept = range(LONG) if pattern == "F" else range(LONG - 6, LONG)
    assert held(tiny.model(pattern), tokens(LONG)) == [list(kept)] * 2
