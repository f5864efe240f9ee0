"""Weights of one product, which move beside each other in memory: what that may and may not do to a model."""

import copy

import pytest
import torch
from torch import nn

import megahybrid.hf.inference_megahybrid as inference
import megahybrid.hf.layers_megahybrid as layers
from megahybrid.hf.modeling_megahybrid import MegahybridForCausalLM
from tests.hf.test_modeling import close
from tests.hf.tiny import expected_logits, pair, random_tokens

pytestmark = pytest.mark.usefixtures("process_group")

PATTERN = "GLSFN"
TOKENS = random_tokens(40)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """As on a GPU."""
    for module in (layers, inference):
        monkeypatch.setattr(module, "takes_kernels", lambda _: True)


@torch.no_grad()
def read(model):
    """Logits of TOKENS, with a cache."""
    cache, found = None, []
    for piece in (TOKENS[:30], *TOKENS[30:].split(1)):
        out = model(piece[None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[0])
    return torch.cat(found)


def lie_beside(model):
    """Of every layer: whether its mixer's projections do, and its SwiGLU's."""
    found = []
    for block in model.model.layers:
        for module, names in ((block.mixer, ("q_proj", "k_proj", "v_proj")), (block.mlp, ("gate_proj", "up_proj"))):
            found.append(layers.beside([getattr(module, name).weight for name in names], 0) is not None)
    return found


def test_they_move_once_and_stay_what_they_were():
    trained, model = pair(PATTERN)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = expected_logits(trained, TOKENS)
    assert not any(lie_beside(model))
    close(read(model), expected)
    assert all(lie_beside(model))
    places = [weight.data_ptr() for weight in model.parameters()]
    close(read(model), expected)
    assert places == [weight.data_ptr() for weight in model.parameters()]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_stored_copied_and_cast(tmp_path):
    _, model = pair(PATTERN, torch.float32)
    expected = read(model)
    model.save_pretrained(tmp_path)
    loaded = MegahybridForCausalLM.from_pretrained(tmp_path).eval()
    for other in (loaded, copy.deepcopy(model)):
        close(read(other), expected, 1e-4)
        assert all(lie_beside(other))
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 1.2 * 4 * model.num_parameters()
    model.double()
    assert not any(lie_beside(model))
    close(read(model).float(), expected, 1e-4)
    assert all(lie_beside(model))


def test_training_goes_on_behind_them():
    """Also behind inference mode, whose tensors no gradient may need."""
    _, model = pair(PATTERN)
    other = copy.deepcopy(model)
    with torch.inference_mode():
        read(model)
    assert all(lie_beside(model)) and not any(lie_beside(other))
    for each in (model, other):
        each.requires_grad_(True).train()
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        each(TOKENS[None], labels=TOKENS[None]).loss.backward()
        optimizer.step()
        each.eval()
    close(read(model), read(other))
    assert all(lie_beside(model))


def test_what_somebody_has_laid_together_stays_where_it_is():
    """As DeepSpeed does, which copies into its own memory what it has stepped."""
    trained, model = pair(PATTERN)
    weights = list(model.model.layers.parameters())
    flat = torch.cat([weight.data.flatten() for weight in reversed(weights)])
    for weight, part in zip(reversed(weights), flat.split([each.numel() for each in reversed(weights)]), strict=True):
        weight.data = part.view_as(weight)
    close(read(model), expected_logits(trained, TOKENS))
    flat.zero_()
    assert not any(weight.any() for weight in weights)


def test_not_while_a_graph_is_recorded(monkeypatch):
    _, model = pair(PATTERN)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    moved = [layers.may_move(weight, weight) for weight in model.model.layers.parameters()]
    monkeypatch.undo()
    assert not any(moved)


def test_what_stands_in_a_layers_place_is_asked():
    trained, model = pair(PATTERN)
    expected, seen = expected_logits(trained, TOKENS), []
    for block in model.model.layers:
        block.mixer.q_proj = nn.Sequential(block.mixer.q_proj)
        block.mlp.up_proj.register_forward_hook(lambda *given: seen.append("up"))
        block.mlp.down_proj.register_forward_hook(lambda *given: seen.append("down"))
    close(read(model), expected)
    assert seen == ["up", "down"] * 5 * 11
    for block in model.model.layers:
        block.mlp = nn.Sequential(block.mlp)
    close(read(model), expected)


def test_who_watches_a_swiglu_sees_its_own_output():
    _, model = pair("G")
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: seen.append((module, given[0], out)))
    read(model)
    for module, x, out in seen:
        close(out, nn.functional.linear(module.inner(x), module.down_proj.weight))
    assert len(seen) == 11
