"""Inference by megahybrid_kernels, on a CPU by the ops' references, against the training model and the plain form."""

import copy
import importlib

import pytest
import torch

import megahybrid.hf.inference_megahybrid as inference
import megahybrid.hf.layers_megahybrid as layers
from tests.hf.test_modeling import LENGTH, NO_END, PATTERNS, close, in_pieces, padded
from tests.hf.tiny import expected_logits, pair, random_tokens
from tests.inference.test_decode import OPS

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """As on a GPU, but that no step is recorded."""
    for module in (layers, inference):
        monkeypatch.setattr(module, "takes_kernels", lambda _: True)
    with torch.no_grad():
        yield


@pytest.fixture
def recorded(monkeypatch):
    """Steps run again and again at the addresses of the first, if not as a graph; says how often one was replayed."""
    replays = []

    def record(graph, model, cache):
        y, addresses = torch.empty_like(graph._x), tensors(cache)

        def replay():
            assert all(one is other for one, other in zip(tensors(cache), addresses, strict=True))
            y.copy_(inference.recorded_step(model, graph._x, cache))
            replays.append(graph)

        return y, replay

    monkeypatch.setattr(inference, "takes_graph", lambda _: True)
    monkeypatch.setattr(inference.DecodeGraph, "record", record)
    return replays


def tensors(cache):
    """All that a step writes into."""
    found = [cache.lengths]
    for state in cache.states:
        for part in state.values():
            found += [part] if isinstance(part, torch.Tensor) else part.room.rows
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_left_padding(pattern, recorded):
    """Whole, in pieces of which some are padding only for some rows, and step by step."""
    model, exported = pair(pattern)
    lengths = (LENGTH, 83, 9, 6)
    rows, mask = padded(lengths)
    whole = exported(rows, attention_mask=mask, use_cache=False).logits
    pieces = in_pieces(exported, rows, [20, 40, 10, 29, 1, 1, 1, 1, 1], mask)
    assert len(recorded) == 4  # all rows have begun after 99 tokens, and the first step runs as it is
    steps = in_pieces(exported, rows, [20] + [1] * 84, mask)
    for number, length in enumerate(lengths):
        expected = expected_logits(model, rows[number, -length:])
        for found in (whole, pieces, steps):
            close(found[number, -length:], expected)


def test_a_piece_after_recorded_steps_and_room_that_ends(recorded):
    model, exported = pair("GLSFN")
    tokens = random_tokens(LENGTH)
    found = in_pieces(exported, tokens[None], [30] + [1] * 40 + [5] + [1] * 29)[0]
    close(found, expected_logits(model, tokens))
    # The first step after a piece runs as it is, and that of the 65th token, for which memory grows.
    assert len({id(graph) for graph in recorded}) == 3 and len(recorded) == 40 + 29 - 3


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
)
def test_generate(options, recorded, monkeypatch):
    """As the plain form does."""
    _, exported = pair("GLSFN")
    rows, mask = padded((70, 57, 4))
    generated = []
    for kernels in (True, False):
        monkeypatch.setattr(inference, "takes_kernels", lambda _, kernels=kernels: kernels)
        torch.manual_seed(3)
        out = exported.generate(rows, attention_mask=mask, max_new_tokens=25, **NO_END, **options)
        generated.append(out)
    assert len(recorded) >= 20
    assert torch.equal(*generated)


def test_copies_and_reading_without_going_on(recorded):
    _, exported = pair("GLSFN")
    tokens, cache = random_tokens(LENGTH)[None], None
    for piece in (tokens[:, :40], *tokens[:, 40:50].split(1, 1)):
        cache = exported(piece, past_key_values=cache, use_cache=True).past_key_values
    other = copy.deepcopy(cache)
    assert other.inference.graph is None and cache.inference.graph is not None
    seen = exported(tokens[:, 50:60], past_key_values=cache, use_cache=False).logits
    for each in (cache, other):
        close(in_pieces_from(exported, tokens[:, 50:60], each), seen)
    assert cache.seen == other.seen == 60


def in_pieces_from(model, tokens, cache):
    steps = [model(piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split(1, 1)]
    return torch.cat(steps, 1)


def test_what_somebody_changed_is_not_replayed(recorded):
    _, exported = pair("GL")
    tokens, cache = random_tokens(30)[None], None
    for piece in tokens[:, :8].split(1, 1):
        cache = exported(piece, past_key_values=cache, use_cache=True).past_key_values
    layer, count, seen = exported.model.layers[1].mlp, len(recorded), []
    assert count == 6  # the first one is a prompt, the second one runs as it is
    watch = layer.register_forward_hook(lambda _, __, out: seen.append(out))
    in_pieces_from(exported, tokens[:, 8:12], cache)
    assert len(seen) == 4 and len(recorded) == count
    watch.remove()
    in_pieces_from(exported, tokens[:, 12:14], cache)
    assert len(recorded) == count + 2
    layer.down_proj.weight = torch.nn.Parameter(layer.down_proj.weight * 2)
    in_pieces_from(exported, tokens[:, 14:16], cache)
    assert recorded[-1] is not recorded[-3]
    layer.down_proj = torch.nn.Sequential(layer.down_proj)
    in_pieces_from(exported, tokens[:, 16:18], cache)
    assert len(recorded) == count + 4


def test_a_graph_casts_nothing(recorded):
    _, exported = pair("GL")
    x, cache = exported.model.embedding(random_tokens(9)[None]), None
    for piece in x.split(1, 1):
        cache = exported(inputs_embeds=piece, past_key_values=cache, use_cache=True).past_key_values
    count = len(recorded)
    assert count == 7
    with pytest.raises(RuntimeError, match="dtype"):  # what layers in float64 say to it
        exported(inputs_embeds=x[:, :1].float(), past_key_values=cache, use_cache=True)
    assert len(recorded) == count


def test_where_it_cannot_be_recorded(monkeypatch):
    tried = []

    def refuse(*given):
        tried.append(given)
        raise RuntimeError("not here")

    model, exported = pair("GF")
    monkeypatch.setattr(inference, "takes_graph", lambda _: True)
    monkeypatch.setattr(inference.DecodeGraph, "record", refuse)
    tokens = random_tokens(20)
    cache = exported(tokens[None, :10], use_cache=True).past_key_values
    close(in_pieces_from(exported, tokens[None, 10:], cache)[0], expected_logits(model, tokens)[10:])
    assert len(tried) == 1 and cache.inference.refused


def test_states_of_inference_mode_go_on_outside(recorded):
    model, exported = pair("GLSFN")
    tokens = random_tokens(70)
    with torch.inference_mode():
        cache = exported(tokens[None, :50], use_cache=True).past_key_values
        in_pieces_from(exported, tokens[None, 50:55], cache)
    close(in_pieces_from(exported, tokens[None, 55:], cache)[0], expected_logits(model, tokens)[55:])


def test_hidden_states_and_training():
    _, exported = pair("GL")
    rows, mask = padded((20, 7))
    out = exported(rows, attention_mask=mask, use_cache=True, output_hidden_states=True)
    assert out.past_key_values.inference is not None
    with torch.enable_grad():  # for which the caches are not made
        plain = exported(rows, attention_mask=mask, use_cache=True, output_hidden_states=True)
    assert plain.past_key_values.inference is None
    for one, other in zip(out.hidden_states, plain.hidden_states, strict=True):
        close(one[mask.bool()], other[mask.bool()])


def test_what_comes_of_layers_may_be_trained_on():
    """And who watches one may turn gradients on."""
    _, exported = pair("GL")
    found, weight = [], torch.ones(16, dtype=torch.float64, requires_grad=True)

    @torch.enable_grad()
    def watch(_, given, out):
        x = given[0].clone().requires_grad_()
        x.square().sum().backward()
        found.append(x.grad)

    exported.model.layers[1].register_forward_hook(watch)
    out = exported(random_tokens(30)[None], use_cache=True, output_hidden_states=True)
    with torch.enable_grad():
        sum((each * weight).sum() for each in out.hidden_states).backward()
    assert weight.grad.any() and found[0].any()


def test_no_gradient_goes_through_its_caches():
    model, exported = pair("GL")
    tokens = random_tokens(30)
    cache = exported(tokens[None, :20], use_cache=True).past_key_values
    exported.requires_grad_(True)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"made without gradients, .* torch\.no_grad\(\) around"):
        exported(tokens[None, 20:], past_key_values=cache)
    close(exported(tokens[None, 20:], past_key_values=cache).logits[0], expected_logits(model, tokens)[20:])


def test_padding_alone():
    _, exported = pair("GL")
    rows, mask = padded((20, 7))
    padding = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention_mask is 0 everywhere: give a batch that has a token"):
        exported(rows, attention_mask=0 * mask, use_cache=False)
    out = exported(padding, attention_mask=padding, use_cache=True, output_hidden_states=True)
    assert [each.shape for each in out.hidden_states] == [(2, 5, 16)] * 3
    after = exported(rows, attention_mask=mask, past_key_values=out.past_key_values)
    close(after.logits[mask.bool()], exported(rows, attention_mask=mask).logits[mask.bool()])


def test_autocast(monkeypatch):
    """Linear layers are in bf16, the ops take what these give as it is."""
    _, exported = pair("GLSFN", torch.float32)
    rows, mask = padded((90, 60))
    expected = exported(rows, attention_mask=mask, use_cache=False).logits[mask.bool()]
    seen, op = [], inference.kernels.gated_delta_rule
    monkeypatch.setattr(inference.kernels, "gated_delta_rule", lambda *x, **o: seen.append(x) or op(*x, **o))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([in_pieces(exported, rows, [60] + [1] * 30, mask), exported(rows, mask).logits])
    assert seen and all(x[0].dtype == torch.bfloat16 for x in seen)
    for part in found.chunk(2):
        assert 0 < (part[mask.bool()] - expected).std() < 0.1 * expected.std()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="puts CPU tensors through the interpreter")
@pytest.mark.parametrize("pattern", "GLSFN")
def test_triton(pattern, recorded, monkeypatch):
    for op in OPS:
        monkeypatch.setattr(importlib.import_module(f"megahybrid_kernels.{op}"), "takes_triton", lambda *_: True)
    model, exported = pair(pattern, torch.float32)
    rows, mask = padded((30, 17))
    found = in_pieces(exported, rows, [20] + [1] * 10, mask)
    monkeypatch.undo()
    assert len(recorded) == 9
    for number, length in enumerate((30, 17)):
        close(found[number, -length:], expected_logits(model, rows[number, -length:]), 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_graph(pattern, dtype, monkeypatch):
    """On a GPU: a batch with padding, in steps with a graph and without, bit-equal; in fp32 also as it should be."""
    monkeypatch.undo()
    model, exported = pair(pattern)
    lengths, found, graphs, record = (60, 35), [], [], inference.DecodeGraph.record
    rows, mask = padded(lengths)
    exported.to("cuda", dtype)
    monkeypatch.setattr(inference.DecodeGraph, "record", lambda *given: graphs.append(given) or record(*given))
    for takes in (inference.takes_graph, lambda _: False):
        monkeypatch.setattr(inference, "takes_graph", takes)
        found.append(in_pieces(exported, rows.cuda(), [40] + [1] * 20, mask.cuda()))
    assert torch.equal(*found) and len(graphs) == 1
    if dtype == torch.float32:
        for number, length in enumerate(lengths):
            expected = expected_logits(model, rows[number, -length:])
            close(found[0][number, -length:].double().cpu(), expected, 1e-4)
