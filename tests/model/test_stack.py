import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from megahybrid.errors import UserError
from megahybrid.model import settings
from megahybrid.model.context import Context
from megahybrid.model.loss import attach_loss
from megahybrid.model.mixer import swapped
from megahybrid.model.stack import build
from megahybrid_kernels import Sequences
from tests.model import tiny

PATTERNS = ["G", "L", "S", "F", "N", "GLSFN"]


def logits(model, tokens, context):
    return model.logits(model(tokens, context).hidden)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_do_not_see_each_other(pattern):
    model, tokens = tiny.model(pattern), tiny.tokens()[:-1]
    packed = logits(model, tokens, Context(Sequences.of(tiny.LENGTHS)))
    alone = [logits(model, part, Context(Sequences.of([len(part)]))) for part in tokens.split(tiny.LENGTHS)]
    assert torch.allclose(packed, torch.cat(alone), rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prompt", [1, 5, 30])
def test_pieces_with_state_equal_one_pass(pattern, prompt):
    """Far beyond window + buffer, in pieces of random sizes, for two sequences at once."""
    model, count = tiny.model(pattern), 70
    rows = [tiny.tokens([count], seed)[:-1] for seed in (1, 2)]
    whole = [logits(model, row, Context(Sequences.of([count]))) for row in rows]
    states, at, draw = model.initial_states(2), 0, random.Random(prompt)
    size = prompt
    while at < count:
        piece = torch.cat([row[at : at + size] for row in rows])
        sequences = Sequences.of([len(piece) // 2] * 2, starts=torch.tensor([at, at]))
        out = model(piece, Context(sequences), states=states)
        states = out.states
        for row, expected in zip(model.logits(out.hidden).chunk(2), whole, strict=True):
            assert torch.allclose(row, expected[at : at + size], rtol=0, atol=1e-9), at
        at += size
        size = min(draw.choice([1, 1, 2, 9, 17]), max(1, count - at))


def test_tokens_that_stay_with_ranks_have_no_states_or_other_policies():
    with mock.patch.object(settings, "keepers", lambda config: "L"):
        model, tokens, sequences = tiny.model("GL"), tiny.tokens([9])[:-1], Sequences.of([9])
    for context, states in ((Context(sequences, keep_states=True), None), (Context(sequences), {0: 0, 1: 0})):
        with pytest.raises(UserError, match=r"set parallel\.context to 1"):
            model(tokens, context, states=states)
    with pytest.raises(UserError, match=r"set parallel\.context to 1"), swapped(model, "recency", [[]]):
        pass


@pytest.mark.parametrize("theta, seen", [(10000.0, True), (None, False)])
def test_the_order_of_tokens_is_seen_through_the_rotary_embedding_alone(theta, seen):
    config = tiny.config("F")
    config.model.attention.rope_theta = theta
    model, tokens = build(config, "cpu", torch.float64), tiny.tokens([30])[:-1]
    turned = torch.cat([tokens[:-1].flip(0), tokens[-1:]])
    a, b = (logits(model, row, Context(Sequences.of([30])))[-1] for row in (tokens, turned))
    assert torch.allclose(a, b, rtol=0, atol=1e-10) != seen


def test_eviction_really_happens_in_these_tests():
    """The test above says little unless some head's buffer overflows and some token is dropped."""
    model, seen = tiny.model("GLSF"), []
    mixer = model.layers["1"].mixer
    original = mixer._aux
    mixer._aux = lambda scores, context: seen.append(scores) or original(scores, context)
    model(tiny.tokens([70], 1)[:-1], tiny.training_context([70]))
    positive = (seen[0] > 0).sum(0)
    assert positive.max() > mixer.lte.buffer_size
    assert positive.min() < 70


def test_training_without_cap_differs_from_inference_with_it():
    model, tokens = tiny.model("L"), tiny.tokens([70])[:-1]
    free = logits(model, tokens, tiny.training_context([70]))
    capped = logits(model, tokens, Context(Sequences.of([70])))
    assert not torch.allclose(free, capped)
    model = tiny.model("L", train_cap=True)
    assert torch.allclose(logits(model, tokens, tiny.training_context([70])), capped)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_recompute_gives_the_same_gradients(dtype):
    gradients, lengths = [], (100, 1, 30)  # in the first of which N chooses among blocks
    for recompute in ("none", "all", "LGN"):
        model, tokens = tiny.model("GLSFN", dtype, dropout=0.3, recompute=recompute), tiny.tokens(lengths)
        model.layers["1"].mixer.l1_lambda.fill_(0.7)
        out = model(tokens[:-1], tiny.training_context(lengths), tokens[1:])
        out.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]) and torch.equal(gradient, gradients[2][name]), name


def test_dropout_depends_on_the_step_and_not_on_packing():
    model, tokens = tiny.model("L", dropout=0.5), tiny.tokens([40])[:-1]
    first, again, later = (logits(model, tokens, tiny.training_context([40], step)) for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, later)


def test_tied_and_untied_output():
    tied, untied = tiny.model("G"), tiny.model("G", tie_embeddings=False)
    assert "output.weight" not in dict(tied.named_parameters())
    assert dict(untied.named_parameters())["output.weight"].shape == (tiny.VOCAB, 16)


def test_initial_values_depend_on_seed_and_name_only():
    deep, shallow = tiny.model("GLG", dtype=torch.float32), tiny.model("GLS", dtype=torch.float32)
    assert torch.equal(deep.layers["1"].mixer.q_proj.weight, shallow.layers["1"].mixer.q_proj.weight)
    assert not torch.equal(deep.layers["0"].mixer.q_proj.weight, deep.layers["2"].mixer.q_proj.weight)
    other = tiny.config("GLG")
    other.train.seed = 7
    from megahybrid.model.stack import build

    assert not torch.equal(build(other, "cpu").embedding.weight, deep.embedding.weight)


def test_gate_initialisation_of_gated_deltanet():
    config = tiny.config("G")
    config.model.gdn.num_heads = 512
    from megahybrid.model.stack import build

    mixer = build(config, "cpu").layers["0"].mixer
    rate, step = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 0 < rate.min() < 1 and 15 < rate.max() < 16 and 7 < rate.mean() < 9
    assert 0.001 < step.min() < 0.0012 and 0.09 < step.max() < 0.1
    assert 0.008 < step.median() < 0.0125  # log-uniform: the geometric mean of the ends, 0.01


def test_attached_loss_reaches_its_parameters_with_its_scale():
    x, weight = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    attach_loss(x, weight**2, 0.25).sum().backward()
    assert weight.grad.item() == pytest.approx(0.25 * 4)
    assert x.grad.tolist() == [1, 1, 1]
