"""The exported model against the training model: whole, in pieces, step by step and padded."""

import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import megahybrid.hf.inference_megahybrid as inference
import megahybrid.hf.layers_megahybrid as layers
import megahybrid.mixers.attention.hf as attention
import megahybrid.mixers.gdn.hf as gdn
import megahybrid.mixers.lte.hf as lte
import megahybrid.mixers.nsa.hf as nsa
from megahybrid.hf.modeling_megahybrid import MegahybridCache
from megahybrid.model.context import Context
from megahybrid_kernels import Sequences
from tests.hf.tiny import expected_logits, pair, random_tokens

pytestmark = pytest.mark.usefixtures("process_group")

PATTERNS = ["G", "L", "S", "F", "N", "GL", "GLSFN"]
# Window + buffer of L is 13 tokens, the window of S 7, the blocks that N selects 64: beyond all.
LENGTH = 104
NO_END = {"pad_token_id": 0, "eos_token_id": None}


def close(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=0, atol=tolerance), float((found - expected).abs().max())


@pytest.fixture(params=["plain", "kernels"])
def without_and_with_kernels(request, monkeypatch):
    """Gated DeltaNet once as on a GPU with megahybrid_kernels."""
    monkeypatch.setattr(gdn, "takes_kernels", lambda _: request.param == "kernels")


def in_pieces(model, rows, sizes, mask=None):
    cache, logits, at = None, [], 0
    for size in sizes:
        piece = {} if mask is None else {"attention_mask": mask[:, : at + size]}
        out = model(rows[:, at : at + size], past_key_values=cache, use_cache=True, **piece)
        cache, at = out.past_key_values, at + size
        logits.append(out.logits)
    assert at == rows.shape[1]
    return torch.cat(logits, 1)


def padded(lengths):
    """Rows of these lengths, padded on the left with tokens that must not matter, and their mask."""
    longest = max(lengths)
    rows = torch.stack([random_tokens(longest, seed) for seed, _ in enumerate(lengths, start=1)])
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return rows, mask


@pytest.mark.usefixtures("without_and_with_kernels")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [256, 8])
def test_whole_sequences(pattern, block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(lte, "QUERY_BLOCK", block)
    monkeypatch.setattr(nsa, "QUERY_BLOCK", block)
    monkeypatch.setattr(gdn, "CHUNK", block)
    monkeypatch.setattr(gdn, "CHUNKS", 3)
    model, exported = pair(pattern)
    rows = torch.stack([random_tokens(LENGTH, seed) for seed in (1, 2)])
    found = exported(rows, use_cache=False)
    assert found.past_key_values is None
    for row, tokens in zip(found.logits, rows, strict=True):
        close(row, expected_logits(model, tokens))


@pytest.mark.usefixtures("without_and_with_kernels")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cut", ["steps", "prompt then steps", "pieces"])
def test_with_cache(pattern, cut):
    model, exported = pair(pattern, tie_embeddings=False)
    draw, sizes = random.Random(5), []
    while cut == "pieces" and sum(sizes) < LENGTH:
        sizes.append(min(draw.choice([1, 2, 9, 17, 30]), LENGTH - sum(sizes)))
    if cut != "pieces":
        prompt = 1 if cut == "steps" else 40
        sizes = [prompt] + [1] * (LENGTH - prompt)
    tokens = random_tokens(LENGTH)
    close(in_pieces(exported, tokens[None], sizes)[0], expected_logits(model, tokens))


@pytest.mark.usefixtures("without_and_with_kernels")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_left_padding(pattern):
    """Whole, and in pieces of which some are padding only for some rows."""
    model, exported = pair(pattern)
    lengths = (LENGTH, 83, 5, 1)
    rows, mask = padded(lengths)
    whole = exported(rows, attention_mask=mask, use_cache=False).logits
    pieces = in_pieces(exported, rows, [20, 40, 39, 1, 1, 1, 1, 1], mask)
    for number, length in enumerate(lengths):
        expected = expected_logits(model, rows[number, -length:])
        close(whole[number, -length:], expected)
        close(pieces[number, -length:], expected)


@pytest.mark.parametrize("kernels", [False, True])
def test_padding_between_tokens_of_a_sequence(kernels, monkeypatch):
    """The packed form leaves it out; the plain one refuses it: in a piece, at a border of pieces and between turns."""
    for module in (layers, inference):
        monkeypatch.setattr(module, "takes_kernels", lambda _: kernels)
    model, exported = pair("GLSFN")
    rows = random_tokens(40)[None].repeat(2, 1)
    for first, last, sizes in ((25, 30, [40]), (10, 20, [20, 20]), (20, 27, [20, 20]), (20, 25, [20, 5, 1, 14])):
        mask = torch.ones_like(rows)
        mask[1, first:last] = 0
        with torch.no_grad(), nullcontext() if kernels else pytest.raises(ValueError, match="padding may not stand"):
            found = in_pieces(exported, rows, sizes, mask)
        if kernels:
            close(found[1][mask[1].bool()], expected_logits(model, rows[1][mask[1].bool()]))


def test_right_padding_before_a_cache_goes_on():
    """Logits as without a cache; it is refused when a padded sequence goes on, for those too that a beam copied."""
    _, exported = pair("GLSFN")
    rows, mask = padded((20, 20))
    mask[1, 12:] = 0
    out = exported(rows, attention_mask=mask, use_cache=True)
    close(out.logits, exported(rows, attention_mask=mask, use_cache=False).logits)
    cache = out.past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.ended.tolist() == [True, False]
    for use_cache in (False, True):
        with pytest.raises(ValueError, match="padding may not stand"):
            exported(rows[:, :1], past_key_values=cache, use_cache=use_cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    exported(rows[:, :1], past_key_values=cache)
    cache.reset()
    assert cache.ended is None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_in_fp32(pattern, monkeypatch):
    model, exported = pair(pattern, torch.float32)
    nearest, margins = [1.0], [1.0]
    for block in exported.model.layers:
        if hasattr(block.mixer, "router"):
            block.mixer.router.register_forward_hook(lambda _, __, out: nearest.append(float(out[0].abs().min())))
    selected = nsa.NSAAttention.selected

    def watched(mixer, q, positions, scores, state):
        for own in (positions[0] // mixer.block).unique().tolist():
            free = scores[:, :, positions[0] // mixer.block == own, 1 : max(1, own - 1)].sort(-1).values
            if own >= mixer.count:
                margins.append(float(free.diff(dim=-1)[..., -(mixer.count - 3)].min()))
        return selected(mixer, q, positions, scores, state)

    monkeypatch.setattr(nsa.NSAAttention, "selected", watched)
    tokens = random_tokens(LENGTH)
    whole = exported(tokens[None], use_cache=False).logits[0]
    assert min(nearest) > 1e-4 / 4  # of the logit; the score's slope there is 1/4
    assert min(margins) > 1e-4 and (len(margins) > 1) == ("N" in pattern)
    expected = expected_logits(model, tokens)
    close(whole, expected, 1e-4)
    close(in_pieces(exported, tokens[None], [33] + [1] * (LENGTH - 33))[0], expected, 1e-4)


def test_of_equal_blocks_the_first_are_selected():
    model, exported = pair("N")
    for each in (model.layers["0"].mixer, exported.model.layers[0].mixer):
        each.k_proj.weight.zero_()
    tokens = random_tokens(LENGTH)
    expected = expected_logits(model, tokens)
    close(exported(tokens[None], use_cache=False).logits[0], expected)
    close(in_pieces(exported, tokens[None], [90] + [1] * (LENGTH - 90))[0], expected)


def test_gates_are_rounded_once_as_in_training():
    """In bf16, of tokens alone, which two of the branches answer with their value: every bit is the one by hand."""
    model, exported = pair("N", torch.bfloat16)
    x, outputs = 3 * torch.randn(500, 1, 16, generator=torch.Generator().manual_seed(0)).bfloat16(), []
    training, mixer = model.layers["0"].mixer, exported.model.layers[0].mixer
    for each in (training, mixer):
        each.g_proj.weight.copy_(torch.eye(16)[:12])
        each.v_proj.weight.copy_(torch.eye(16))
        each.o_proj.register_forward_pre_hook(lambda _, given: outputs.append(given[0].view(500, 4, 8)))
    training(x, Context(Sequences.of([1] * 500)))
    mixer(x, torch.zeros(500, 1, dtype=torch.int64), mixer.empty_state(x))
    gates = torch.sigmoid(x[:, 0, :12].double()).bfloat16().float().view(500, 4, 3)
    value = x.float().view(500, 2, 8).repeat_interleave(2, 1)
    expected = (gates[..., 1:2] * value + gates[..., 2:] * value).bfloat16()
    assert torch.equal(outputs[0], expected) and torch.equal(outputs[1], expected)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 47, 63, 64, 65, 79, 80, 81])
def test_borders_of_blocks(length):
    model, exported = pair("N")
    tokens = random_tokens(length)
    close(exported(tokens[None], use_cache=False).logits[0], expected_logits(model, tokens))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_far_positions(dtype, tolerance):
    """Attention knows distances alone: a text that begins beyond 2^24 has the logits of one that begins at 0."""
    model, exported = pair("SF", dtype)
    tokens, start = random_tokens(LENGTH), 2**24 + 1001
    expected = expected_logits(model, tokens)
    cache = MegahybridCache(2)
    cache.lengths = torch.tensor([start])
    close(exported(tokens[None], past_key_values=cache, use_cache=True).logits[0], expected, tolerance)
    sequences = Sequences.of([LENGTH], starts=torch.tensor([start]))
    close(model.logits(model(tokens, Context(sequences)).hidden), expected, tolerance)


def test_the_buffer_overflows_in_these_tests():
    _, exported = pair("L")
    seen = []
    exported.model.layers[0].mixer.router.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    exported(random_tokens(LENGTH)[None])
    positive = (seen[0][0, :, 6:] > 0).sum(-1)
    assert positive.max() > exported.config.lte["buffer_size"] and positive.min() < LENGTH - 6


def test_states_of_a_fixed_size():
    _, exported = pair("GLS")

    def shapes(cache):
        return [{name: x.shape for name, x in state.items()} for state in cache.states]

    cache = exported(random_tokens(3)[None], use_cache=True).past_key_values
    before = shapes(cache)
    exported(random_tokens(80)[None], past_key_values=cache, use_cache=True)
    assert shapes(cache) == before and cache.get_seq_length() == 83
    # Nor do they keep the memory of what they are a part of.
    parts = [x for state in cache.states for x in state.values()]
    assert all(x.untyped_storage().nbytes() <= 4 * x.nbytes for x in parts)


def test_reordered_cache():
    """Beams that change places and are given up, as beam search does."""
    _, exported = pair("GLSFN")
    rows, mask = padded((90, 70, 12))
    cache = exported(rows, attention_mask=mask, use_cache=True).past_key_values
    order, following = torch.tensor([2, 0, 2]), torch.tensor([[3], [7], [9]])
    cache.reorder_cache(order)
    mask = F.pad(mask[order], (0, 1), value=1)
    found = exported(following, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    expected = exported(torch.cat([rows[order], following], 1), attention_mask=mask, use_cache=False).logits
    close(found[:, -1], expected[:, -1])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 9},
        {"do_sample": True, "num_return_sequences": 2, "top_p": 0.9},
    ],
)
def test_generate(options):
    """With the cache as without it, on a batch with left padding."""
    _, exported = pair("GLSFN")
    rows, mask = padded((70, 57, 4))
    generated = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        out = exported.generate(
            rows,
            attention_mask=mask,
            max_new_tokens=25,
            use_cache=use_cache,
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )
        assert out.shape == (3 * options.get("num_return_sequences", 1), 95)
        generated.append(out)
    assert torch.equal(*generated)


def test_greedy_continuation_of_the_training_model():
    model, exported = pair("GL")
    tokens = random_tokens(20)
    found = exported.generate(tokens[None], max_new_tokens=20, do_sample=False, **NO_END)[0]
    for _ in range(20):
        tokens = torch.cat([tokens, expected_logits(model, tokens)[-1:].argmax(-1)])
    assert torch.equal(found, tokens)


def test_loss_and_kept_logits():
    _, exported = pair("GL")
    rows = random_tokens(30)[None]
    out = exported(rows, labels=rows)
    assert torch.allclose(out.loss, F.cross_entropy(out.logits[0, :-1], rows[0, 1:]).float())
    close(exported(rows, logits_to_keep=2).logits, out.logits[:, -2:])


def test_new_weights_train():
    """A model made from its configuration alone."""
    from megahybrid.hf.configuration_megahybrid import MegahybridConfig
    from megahybrid.hf.modeling_megahybrid import MegahybridForCausalLM
    from megahybrid.hf.naming import exported_config
    from tests.model import tiny

    torch.manual_seed(0)
    model = MegahybridForCausalLM(MegahybridConfig(**exported_config(tiny.config("GLSFN"))))
    assert all(weight.isfinite().all() for weight in model.parameters())
    rows = random_tokens(50)[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_torch_compile():
    """All layers in one graph, and few graphs for the steps of a text."""
    _, exported = pair("GLSFN", torch.float32)
    tokens, graphs, cache = random_tokens(40)[None], torch._dynamo.testing.CompileCounter(), None
    expected = exported(tokens, use_cache=False).logits
    found = torch.compile(exported, backend="eager", fullgraph=True)(tokens, use_cache=False).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    compiled = torch.compile(exported, backend=graphs)
    with torch._dynamo.config.patch(recompile_limit=64):
        for number in range(12):
            out = compiled(tokens[:, number : number + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            assert torch.allclose(out.logits[0, 0], expected[0, number], rtol=0, atol=1e-5)
    assert graphs.frame_count <= 4
