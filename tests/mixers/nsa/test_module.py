"""Native sparse attention in a model: against plain float64 from its weights, recomputed, watched and trained."""

import pytest
import torch
import torch.nn.functional as F
from oracles_nsa import oracle_attention, oracle_selection

import megahybrid.mixers.nsa.module as nsa
from megahybrid.config.schema import ParallelConfig
from megahybrid.key import derived, keys
from megahybrid.mixers import KINDS
from megahybrid.mixers.nsa import NSAConfig
from megahybrid.model.context import Context, Watch
from megahybrid.parallel import groups
from megahybrid_kernels import Sequences
from megahybrid_kernels.native_sparse_attention import limits
from tests.mixers.by_hand import rotated
from tests.model import tiny
from tests.model.test_gradients import assert_gradients_match, autograd_gradients

# Ten blocks of 16, of which a query selects four; a token; and a document that is selected whole.
LENGTHS = (150, 1, 23)
KV_HEADS, HEAD_DIM, LIMITS = 2, 8, (16, 4, 21)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


def by_hand(mixer, x):
    """The mixer's output for `[tokens, hidden]`, and the selection."""
    q, k, v = (F.linear(x, getattr(mixer, f"{name}_proj").weight).unflatten(1, (-1, HEAD_DIM)) for name in "qkv")
    gates = 1 / (1 + torch.exp(-F.linear(x, mixer.g_proj.weight).unflatten(1, (-1, 3))))
    q, k = rotated(q, LENGTHS), rotated(k, LENGTHS)
    selection = oracle_selection(q, k, LENGTHS, *LIMITS[:2])
    o = oracle_attention(q, k, v, gates, selection, LENGTHS, LIMITS[0], LIMITS[2])
    return F.linear(o.flatten(1), mixer.o_proj.weight), selection


def layer_and_input():
    torch.manual_seed(0)
    return tiny.model("N").layers["0"].mixer, torch.randn(sum(LENGTHS), 1, 16, dtype=torch.float64)


def test_the_keys_take_what_the_op_takes():
    rules = {name: each for name, _, each in keys(NSAConfig())}
    assert rules["block_size"].choices == limits.BLOCK_SIZES
    assert (rules["num_blocks"].at_least, rules["num_blocks"].at_most) == (limits.FORCED_BLOCKS, limits.MOST_BLOCKS)


def test_a_layer_is_what_its_weights_say():
    mixer, x = layer_and_input()
    with torch.no_grad():
        found, aux, _ = mixer(x, Context(Sequences.of(LENGTHS)))
        expected, selection = by_hand(mixer, x[:, 0])
    assert aux is None and torch.allclose(found[:, 0], expected, rtol=0, atol=1e-10)
    assert selection[149, 0].tolist() != selection[149, 1].tolist(), "heads that select alike say too little"


def test_gradients_by_finite_differences():
    model, tokens = tiny.model("GN"), tiny.tokens(LENGTHS)
    context = tiny.training_context(LENGTHS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "training_context", lambda: context)
        assert_gradients_match(model, tokens, autograd_gradients(model, tokens))


def gradients(recompute):
    model, tokens = tiny.model("GN", recompute=recompute), tiny.tokens(LENGTHS)
    model(tokens[:-1], tiny.training_context(LENGTHS), tokens[1:]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_recompute_cannot_flip_a_selection(monkeypatch):
    """Where left to itself, the second pass here selects other blocks."""
    expected, real, given = gradients("none"), nsa.native_sparse_attention, []

    def perturbed(q, k, v, gates, sequences, *rest):
        limits, selection = rest[:3], rest[3]
        given.append(selection)
        if selection is None and torch.is_grad_enabled():
            selection = real(-q, k, v, gates, sequences, *limits)[1]
        return real(q, k, v, gates, sequences, *limits, selection)

    monkeypatch.setattr(nsa, "native_sparse_attention", perturbed)
    found = gradients("N")
    assert given[0] is None and given[1] is not None and len(given) == 2
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    other = gradients("none")
    assert max((other[name] - gradient).abs().max() for name, gradient in expected.items()) > 1e-3


def test_what_is_seen_is_the_window_and_the_selected_blocks():
    mixer, x = layer_and_input()
    count = sum(LENGTHS)
    watch = Watch(torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count))
    with torch.no_grad():
        _, aux, _ = mixer(x, Context(Sequences.of(LENGTHS), watch=watch))
        _, selection = by_hand(mixer, x[:, 0])
    expected, begin = torch.zeros(KV_HEADS, count, count, dtype=torch.bool), 0
    for length in LENGTHS:
        for i in range(length):
            for head in range(KV_HEADS):
                blocks = selection[begin + i, head].tolist()
                for j in range(i + 1):
                    expected[head, begin + i, begin + j] = i - j < LIMITS[2] or j // LIMITS[0] in blocks
        begin += length
    assert torch.equal(aux.seen.T.reshape(expected.shape), expected)


@pytest.mark.parametrize("length", [40, 150])
def test_a_state_holds_every_key(length):
    mixer, state = tiny.model("N").layers["0"].mixer, None
    for begin, end in ((0, 7), (7, length)):
        starts = torch.full((2,), begin)
        context = Context(Sequences.of([end - begin] * 2, starts=starts if begin else None))
        with torch.no_grad():
            x = torch.randn(2 * (end - begin), 1, 16, dtype=torch.float64)
            _, _, state = mixer(x, context, state or mixer.initial_state(2))
    assert mixer.held(state).tolist() == [[list(range(length))] * KV_HEADS] * 2


def test_it_learns():
    """To go on with four texts of 40 tokens that come back again and again."""
    model = tiny.model("GN", dtype=torch.float32)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for step in range(60):
        fresh = torch.randint(0, tiny.VOCAB, (40,), generator=torch.Generator().manual_seed(step % 4))
        tokens = fresh.repeat(3)
        loss = model(tokens[:-1], tiny.training_context((119,)), tokens[1:]).loss / 119
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


@pytest.mark.parametrize("window_size", [5, 17, 18, 40])
def test_its_window_is_what_every_query_sees_whatever_it_selects(window_size):
    model = derived(tiny.config("N").model)
    model.nsa.window_size, seen = window_size, []
    for i in range(100, 150):
        sure = [j for j in range(i + 1) if i - j < window_size or j // 16 in (i // 16, i // 16 - 1)]
        seen.append(next(n for n in range(i) if i - n not in sure))
    assert KINDS["N"].window(model) == min(seen)
