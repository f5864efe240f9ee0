"""Gradients of tiny models against finite differences in float64, one direction a parameter."""

import pytest
import torch

import megahybrid.mixers.lte.module as lte_mixer
from tests.model import tiny


def total_loss(model, tokens):
    """Cross-entropy plus the auxiliary losses, as a plain sum for finite differences."""
    out = model(tokens[:-1], tiny.training_context(), tokens[1:])
    return out.loss / (len(tokens) - 1) + sum(each.loss for each in out.aux.values())


def autograd_gradients(model, tokens):
    """What training computes: the auxiliary loss comes in through the activations alone."""
    model.zero_grad()
    out = model(tokens[:-1], tiny.training_context(), tokens[1:])
    (out.loss / (len(tokens) - 1)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_gradients_match(model, tokens, gradients):
    generator = torch.Generator().manual_seed(5)
    step = 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                values.append(total_loss(model, tokens))
                parameter.sub_(direction, alpha=sign * step)
        slope = ((values[0] - values[1]) / (2 * step)).item()
        expected = (gradients[name] * direction).sum().item()
        assert expected == pytest.approx(slope, rel=1e-5, abs=1e-8), name
        assert gradients[name].abs().max() > 0, f"{name} gets no gradient"


@pytest.mark.parametrize("pattern", ["G", "S", "F", "GSF"])
def test_gradients_by_finite_differences(pattern):
    model, tokens = tiny.model(pattern), tiny.tokens()
    assert_gradients_match(model, tokens, autograd_gradients(model, tokens))


@pytest.mark.parametrize("train_cap, gate", [(False, "value"), (True, "value"), (True, "logit")])
def test_lte_gradients_against_the_surrogate(train_cap, gate, monkeypatch):
    """With keep decisions frozen, LTE's gradient is that of attention to v' = (1 + r - r0) v, or with logits + r - r0,
    plus the L1 term."""
    model, tokens = tiny.model("GL", train_cap=train_cap, gate=gate), tiny.tokens()
    model.layers["1"].mixer.l1_lambda.copy_(torch.tensor([0.5, 0.8]))
    gradients = autograd_gradients(model, tokens)
    real, frozen = lte_mixer.lte_attention, []

    def surrogate(q, k, v, scores, *rest):
        if not frozen:
            frozen.append(scores.detach().clone())
        change, head_dim = (scores - frozen[0]).unsqueeze(-1), q.shape[2]
        if gate == "value":
            return real(q, k, v * (1 + change), frozen[0], *rest)
        k, v = torch.cat([k, change], -1), torch.cat([v, 0 * change], -1)  # one more channel adds the change
        q = torch.cat([q * head_dim**-0.5, torch.ones_like(q[..., :1])], -1) * (head_dim + 1) ** 0.5
        return real(q, k, v, frozen[0], *rest)[..., :head_dim]

    monkeypatch.setattr(lte_mixer, "lte_attention", surrogate)
    with torch.no_grad():
        total_loss(model, tokens)
    assert (frozen[0] > 0).any() and (frozen[0] < 0).any()
    assert_gradients_match(model, tokens, gradients)


@pytest.mark.parametrize("gate", ["value", "counterfactual", "displacing"])
def test_keys_and_values_hear_nothing_of_scores_without_routing_grad(gate, monkeypatch):
    """Routers do as ever; keys and values get what they get where scores have no gradient at all."""
    tokens, found = tiny.tokens(), {}
    for case in ("paper", "apart", "none"):
        model = tiny.model("GL", train_cap=True, gate=gate)
        mixer = model.layers["1"].mixer
        mixer.l1_lambda.fill_(0.5)
        mixer.router.routing_grad = case == "paper"
        if case == "none":
            real = mixer.router.forward
            monkeypatch.setattr(mixer.router, "forward", lambda *given, real=real, **how: (
                real(*given, **how)[0].detach(), *given[:2]))  # fmt: skip
        model(tokens[:-1], tiny.training_context(), labels=tokens[1:]).loss.backward()
        found[case] = {name: x.grad for name, x in mixer.named_parameters()}
    names = {name for name in found["paper"] if "router" in name}
    assert names and all((found["paper"][name] == found["apart"][name]).all() for name in names)
    for name in ("k_proj.weight", "v_proj.weight"):
        torch.testing.assert_close(found["apart"][name], found["none"][name], rtol=1e-12, atol=1e-14)
        assert not torch.allclose(found["paper"][name], found["apart"][name])


def test_l1_term_of_one_layer_by_hand(monkeypatch):
    model, tokens, scores = tiny.model("GL"), tiny.tokens(), []
    mixer = model.layers["1"].mixer
    mixer.l1_lambda.copy_(torch.tensor([0.5, 0.8]))
    real = mixer._aux
    monkeypatch.setattr(mixer, "_aux", lambda each, context: scores.append(each) or real(each, context))
    aux = model(tokens[:-1], tiny.training_context()).aux[1]
    expected, kept, at = 0.0, [0, 0], 0
    for length in tiny.LENGTHS:
        for position in range(max(0, length - 6)):  # the last 6 positions of a document lack right context
            for head, weight in enumerate((0.5, 0.8)):
                score = scores[0][at + position, head].item()
                expected += weight * max(score, 0.0)
                kept[head] += score > 0
        at += length
    assert aux.loss.item() == pytest.approx(expected / (sum(tiny.LENGTHS) * 2), rel=1e-6)
    assert aux.counts["kept"].tolist() == kept
    assert aux.counts["positions"].tolist() == [sum(max(0, length - 6) for length in tiny.LENGTHS)]
