"""Weights of one product, which move beside each other in memory: what that may and may not do to a model."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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


def test_one_that_goes_elsewhere_is_found_there():
    """Alone: at another place, or at its own in another order or with fewer rows."""
    _, model = pair(PATTERN)
    expected = read(model)
    for name in ("mlp.up_proj.weight", "mixer.q_proj.weight", "mixer.q_conv"):
        for block in model.model.layers:
            parts = dict(block.named_parameters())
            if name in parts:
                parts[name].data = parts[name].data * 1.5
        assert not torch.equal(read(model), before := expected)
        expected = read(model)
        close(read(copy.deepcopy(model)), expected)
        assert not torch.allclose(expected, before)


def test_one_that_changes_where_it_is_is_found():
    layer, other = (torch.nn.Linear(64, 64, bias=False).eval() for _ in range(2))
    x = torch.randn(5, 64)

    def check():
        with torch.no_grad():
            for found, each in zip(layers.project(x, layer, other), (layer, other), strict=True):
                torch.testing.assert_close(found, x @ each.weight.T)

    check()
    for each in (other, layer):
        each.weight.data = each.weight.data.T
        check()
    other.weight = torch.nn.Parameter(other.weight[:32])
    check()


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


def test_what_somebody_else_sees_stays_where_it_is():
    trained, model = pair(PATTERN)
    taken = model.state_dict()
    close(read(model), expected_logits(trained, TOKENS))
    assert not any(lie_beside(model))
    for weight in taken.values():
        weight.zero_()
    assert not any(weight.any() for weight in model.parameters())


def trained_steps(model, evaluated=True):
    """Losses of three steps, each after one of evaluation."""
    optimizer, losses = torch.optim.SGD(model.requires_grad_(True).parameters(), 0.3), []
    for _ in range(3):
        if evaluated:
            with torch.no_grad():
                losses.append(float(model.eval()(TOKENS[None], labels=TOKENS[None], use_cache=False).loss))
        loss = model.train()(TOKENS[None], labels=TOKENS[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_training_under_fsdp2_between_evaluations():
    """Whose gathered weights have memory that it writes the next ones to."""
    _, model = pair("GL", torch.float32)
    sharded, mesh = copy.deepcopy(model), init_device_mesh("cpu", (1,))
    for part in (*sharded.model.layers, sharded):
        fully_shard(part, mesh=mesh)
    assert trained_steps(sharded) == pytest.approx(trained_steps(model), abs=1e-5)


def test_reentrant_checkpointing_moves_nothing():
    """Whose first forward is without gradients, and whose second has to be the same."""
    _, model = pair(PATTERN, torch.float32)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": True})
    assert trained_steps(other, evaluated=False) == trained_steps(model, evaluated=False)
    assert not any(lie_beside(other))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_whoever_saves_and_loads_finds_weights_of_their_own(tmp_path):
    _, model = pair(PATTERN, torch.float32)
    expected, file = read(model), tmp_path / "model.safetensors"
    assert all(lie_beside(model))
    safetensors.torch.save_model(model, file)
    assert len(safetensors.torch.load_file(file)) == len(list(model.parameters()))
    other = MegahybridForCausalLM(model.config).eval()
    read(other)
    safetensors.torch.load_model(other, file)
    close(read(other), expected, 1e-4)
    assert all(lie_beside(other))
    for part in (model.model.layers[1].mixer, model.model.layers[1].mlp, model):
        read(model)
        taken = part.state_dict()
        alone = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in taken.values()}
        assert sum(alone.values()) == sum(weight.nbytes for weight in part.parameters())
    taken["model.embedding.weight"].zero_()  # they are the model's, no copies
    taken["model.layers.0.mlp.gate_proj.weight"].zero_()
    assert not model.model.embedding.weight.any() and not model.model.layers[0].mlp.gate_proj.weight.any()


def test_autocast_casts_no_weight_twice():
    _, model = pair(PATTERN, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        read(model)
    assert not any(lie_beside(model))


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


def test_who_watches_all_modules_sees_every_layer():
    _, model = pair(PATTERN)
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    read(model)
    assert inference.parts_of(model.model) is None
    handle.remove()
    assert {each for each in model.model.modules() if isinstance(each, nn.Linear)} <= seen


def test_who_watches_a_swiglu_sees_its_own_output():
    _, model = pair("G")
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: seen.append((module, given[0], out)))
    read(model)
    for module, x, out in seen:
        close(out, nn.functional.linear(module.inner(x), module.down_proj.weight))
    assert len(seen) == 11
