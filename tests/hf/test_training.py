"""Fine-tuning the exported model: gradients, losses of parts of a batch, packed rows, recomputation, autocast, LoRA."""

import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

import megahybrid.hf.inference_megahybrid as inference
import megahybrid.hf.layers_megahybrid as layers
import megahybrid.mixers.attention.hf as attention
import megahybrid.mixers.gdn.hf as gdn
import megahybrid.mixers.lte.hf as lte
import megahybrid.mixers.nsa.hf as nsa
from megahybrid.hf.naming import exported_name
from tests.hf.tiny import pair, random_tokens
from tests.inference.test_decode import OPS
from tests.model import tiny

pytestmark = pytest.mark.usefixtures("process_group")

LENGTHS = (70, 9, 41, 1, 23)
PATTERN = "GLSFN"


@pytest.fixture(params=["plain", "kernels"])
def without_and_with_kernels(request, monkeypatch):
    """The second as on a GPU with megahybrid_kernels."""
    for module in (layers, inference, gdn):
        monkeypatch.setattr(module, "takes_kernels", lambda _: request.param == "kernels")


def trainable(pattern, dtype=torch.float64, **options):
    _, exported = pair(pattern, dtype, **options)
    return exported.requires_grad_(True).train()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(x) if x.grad is None else x.grad.clone() for name, x in model.named_parameters()}


def same(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=tolerance, atol=tolerance), name


def packed_row(lengths=LENGTHS):
    """A row of documents, its labels without those across borders, and what collators tell of the borders."""
    row = random_tokens(sum(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].int()
    ways = {
        "position_ids": {"position_ids": positions},
        "cu_seq_lens": dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders) | {"max_length_q": max(lengths)},
        "seq_idx": {"seq_idx": numbers},
    }
    return row, row.masked_fill(positions == 0, -100), ways


@pytest.mark.usefixtures("without_and_with_kernels")
@pytest.mark.parametrize("pattern", [*PATTERN, PATTERN])
@pytest.mark.parametrize("block", [256, 8])
def test_gradients_of_the_training_model(pattern, block, monkeypatch):
    """Of all parameters, routers included, with the buffer enforced in training and the L1 term of equal lambdas."""
    for module in (attention, lte, nsa):
        monkeypatch.setattr(module, "QUERY_BLOCK", block)
    monkeypatch.setattr(gdn, "CHUNK", block)
    model, _ = pair(pattern, train_cap=True)
    model.requires_grad_(True)
    exported = trainable(pattern, train_cap=True)
    row, _, ways = packed_row()
    seed = torch.randn(row.shape[1], tiny.VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in model.layers.values():
        if hasattr(layer.mixer, "l1_lambda"):
            layer.mixer.l1_lambda.fill_(3)
    context = replace(tiny.training_context(LENGTHS), aux_scale=float(row.shape[1]))  # of a mean over tokens
    loss = (model.logits(model(row[0], context).hidden) * seed).sum()
    expected = {exported_name(name): x for name, x in gradients(model, loss).items()}
    found = exported.model(row, **ways["position_ids"])
    aux = 0 if found.aux_loss is None else 3 * found.aux_loss
    same(gradients(exported, (exported.lm_head(found.last_hidden_state[0]) * seed).sum() + aux), expected)
    assert all(x.any() for x in expected.values())
    assert ("L" in pattern) == bool(aux)


@pytest.mark.usefixtures("without_and_with_kernels")
@pytest.mark.parametrize("way", ["position_ids", "cu_seq_lens", "seq_idx"])
def test_documents_of_a_row_do_not_see_each_other(way):
    """As sequences alone, with all that a collator gives, and in rows that begin or end with padding."""
    _, exported = pair(PATTERN)
    row, _, ways = packed_row()
    alone = torch.cat([exported(part, use_cache=False).logits for part in row.split(LENGTHS, 1)], 1)
    found = exported(row, **ways[way], output_hidden_states=True)
    assert found.past_key_values is None and torch.allclose(found.logits, alone, rtol=0, atol=1e-9)
    if way == "position_ids":
        sides = (11, 0), (0, 11)
        two, positions, mask = (
            torch.cat([F.pad(x, side, value=1) for side in sides]) for x in (row, ways[way][way], torch.ones_like(row))
        )
        mask[0, :11] = mask[1, -11:] = 0
        found = exported(two, attention_mask=mask, position_ids=positions).logits
        assert torch.allclose(found[mask.bool()], alone.expand(2, -1, -1).flatten(0, 1), rtol=0, atol=1e-9)


def test_positions_that_the_mask_tells_change_nothing():
    """As transformers makes them, with padding and behind a cache."""
    _, exported = pair(PATTERN)
    rows = torch.stack([random_tokens(60, seed) for seed in (1, 2)])
    mask = (torch.arange(60) >= torch.tensor([0, 13])[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = exported(rows, attention_mask=mask, use_cache=False).logits[mask.bool()]
    for given in (positions, positions.masked_fill(mask == 0, 1), torch.arange(60)[None]):
        found = exported(rows, attention_mask=mask, position_ids=given, use_cache=False).logits[mask.bool()]
        assert torch.equal(found, expected)
    first = exported(rows[:, :40], attention_mask=mask[:, :40], position_ids=positions[:, :40])
    second = exported(rows[:, 40:], attention_mask=mask, position_ids=positions[:, 40:], cache=first.past_key_values)
    found = torch.cat([first.logits, second.logits], 1)[mask.bool()]
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_positions_that_are_not_counted_are_refused():
    """An offset, steps of two, another place than the cache's end, a second document that begins elsewhere."""
    _, exported = pair("GL")
    row, mask = random_tokens(5)[None].expand(2, -1), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    cache = exported(row, attention_mask=mask, use_cache=True).past_key_values
    wrong = [1000, 1001, 1002, 1003, 1004], [0, 2, 4, 6, 8], [0, 1, 2, 7, 8], [0, 1, 2, 2, 3], [4, 3, 2, 1, 0]
    for ids in wrong:
        with pytest.raises(ValueError, match="position_ids are not those of whole documents: give 0"):
            exported(row, position_ids=torch.tensor([ids]), use_cache=False)
    with pytest.raises(ValueError, match="position_ids are not those"):
        exported(row, attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 3, 4], [0, 1, 1, 2, 3]]))
    for ids in ([[0], [0]], [[5], [4]], [[4], [3]]):
        with pytest.raises(ValueError, match="position_ids are not those"):
            exported(row[:, :1], past_key_values=cache, position_ids=torch.tensor(ids))
    for ids in ([[5], [3]], [[5], [5]]):
        exported(row[:, :1], past_key_values=cache, use_cache=False, position_ids=torch.tensor(ids))


@pytest.mark.usefixtures("without_and_with_kernels")
def test_padding_inside_a_document():
    """Which positions leave out, when they are those of several: it ends none."""
    _, exported = pair("GL")
    row, mask = random_tokens(9)[None], torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1]])
    ids = torch.tensor([[0, 1, 0, 0, 2, 3, 0, 1, 2]])
    found = exported(row, attention_mask=mask, position_ids=ids).logits[mask.bool()]
    parts = [row[mask.bool()][:4], row[0, 6:]]
    expected = torch.cat([exported(part[None], use_cache=False).logits[0] for part in parts])
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_what_would_be_computed_wrongly_is_refused():
    _, exported = pair("G")
    row, _, ways = packed_row((3, 4))
    cache = exported(row, use_cache=True).past_key_values
    for options in ({"use_cache": True}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match="Rows of several documents have no cache"):
            exported(row, **ways["seq_idx"], **options)
    with pytest.raises(ValueError, match=r"do not know output_attentions, token_type_ids: leave"):
        exported(row, token_type_ids=row, output_attentions=True, head_mask=None)
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions: give one of 2"):
        exported(row, attention_mask=torch.ones(1, 1, 7, 7))


@pytest.mark.usefixtures("without_and_with_kernels")
@torch.no_grad()
def test_what_is_not_of_one_batch_is_refused():
    _, exported = pair("GL")
    row = random_tokens(7)[None]
    cache = exported(row.expand(2, -1), use_cache=True).past_key_values
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"The cache has 2 sequences and the batch {count}: give those"):
            exported(row[:, :1].expand(count, -1), past_key_values=cache)
    for shape in ((1, 1), (2, 2), (2, 7), (2, 9)):
        with pytest.raises(ValueError, match=f"has {shape[0]} rows of {shape[1]} tokens: give 2 of 1, .* or of 8, "):
            exported(row[:, :1].expand(2, -1), past_key_values=cache, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions: give one of 2"):
        exported(row[:, :1].expand(2, -1), past_key_values=cache, attention_mask=torch.ones(2, 1, 1, 8))
    with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache, whose .*: leave it out"):
        exported(row, past_key_values=DynamicCache())
    assert cache.seen == 7


@pytest.mark.usefixtures("without_and_with_kernels")
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side):
    """Padding changes no gradient: nothing is learnt of what follows it, nor behind it what comes first in a row."""
    exported = trainable(PATTERN)
    exported.config.router_aux_loss_coef = 0.3
    rows = torch.stack([random_tokens(50, seed) for seed in (1, 2)])
    lengths = torch.tensor([50, 33])
    place = torch.arange(50) if side == "right" else 49 - torch.arange(50)
    mask = (place < lengths[:, None]).long()
    labels = rows.masked_fill(mask == 0, -100)
    counted = {"num_items_in_batch": int(lengths.sum()) - 2}
    found = gradients(exported, exported(rows, attention_mask=mask, labels=labels, **counted).loss)
    parts = [row[real.bool()][None] for row, real in zip(rows, mask, strict=True)]
    same(found, gradients(exported, sum(exported(part, labels=part, **counted).loss for part in parts)), 1e-5)
    if side == "right":
        mean = exported(rows, attention_mask=mask, labels=labels).loss
        same(found, gradients(exported, mean), 1e-5)


@pytest.mark.parametrize("coefficient", [0, 0.3])
def test_loss_and_gradient_of_a_batch_in_parts(coefficient):
    """1 × 16, 4 × 4 and 16 × 1 rows, of which some have few labels."""
    exported = trainable("GL", torch.float32)
    exported.config.router_aux_loss_coef = coefficient
    rows = torch.stack([random_tokens(40, seed) for seed in range(16)])
    labels = rows.masked_fill(torch.arange(40) < 2 * torch.arange(16)[:, None], -100)
    counted = {"num_items_in_batch": (labels[:, 1:] != -100).sum()}
    found = []
    for size in (16, 4, 1):
        parts = zip(rows.split(size), labels.split(size), strict=True)
        losses = [exported(part, labels=label, **counted).loss for part, label in parts]
        found.append((sum(losses).detach(), gradients(exported, sum(losses))))
    whole = exported(rows, labels=labels).loss
    out = exported.model(rows)
    logits = exported.lm_head(out.last_hidden_state)[:, :-1].double()
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    expected = expected + coefficient * out.aux_loss / counted["num_items_in_batch"]
    assert bool(coefficient) == (abs(expected - F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())) > 1e-3)
    for loss, gradient in found:
        assert torch.allclose(torch.stack([loss.double(), whole.double()]), expected, rtol=1e-6)
        same(gradient, found[0][1], 1e-5)


@pytest.mark.usefixtures("without_and_with_kernels")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    exported = trainable(PATTERN)
    exported.config.router_aux_loss_coef = 0.3
    row, labels, ways = packed_row()
    expected = gradients(exported, exported(row, labels=labels, **ways["position_ids"]).loss)
    exported.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    for block in exported.model.layers:
        block.mixer.register_forward_hook(lambda *_: runs.append(1))
    same(gradients(exported, exported(row, labels=labels, **ways["position_ids"]).loss), expected)
    assert len(runs) >= 2 * len(PATTERN)  # a reference that takes gradients in its backward pass recomputes again


def test_gradient_checkpointing_with_a_cache():
    """Recomputed with reentrance, states would be cut off from what made them."""
    exported = trainable("GL")
    row = random_tokens(20)[None]
    cache = exported(row, use_cache=True).past_key_values
    exported.gradient_checkpointing_enable({"use_reentrant": True})
    for options in ({"use_cache": True}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match="recomputed for gradients take no cache: give use_cache=False"):
            exported(row, **options)
        with torch.no_grad():  # generate, between steps
            assert exported(row, **options).past_key_values.seen >= 20


def test_autocast(monkeypatch):
    """Linear layers and attention are in bf16, what training keeps in fp32 is computed there from the same inputs."""
    _, exported = pair(PATTERN, torch.float32)
    repeated = []

    def watched(function):
        def call(*arguments):
            found = function(*arguments)
            with torch.autocast("cpu", enabled=False):
                expected = function(*arguments)
            repeated.append(all(map(torch.equal, flat(found), flat(expected))))
            return found

        return call

    def flat(found):
        return [x for part in found for x in (part.values() if isinstance(part, dict) else [part])]

    for owner, name in (
        (gdn, "short_convolution"),
        (gdn, "chunked_gated_delta_rule"),
        (exported.model.layers[1].mixer, "router"),
        (exported.model.layers[4].mixer, "compressed"),
    ):
        whole = getattr(owner, name)
        if isinstance(whole, nn.Module):
            monkeypatch.setattr(whole, "forward", watched(whole.forward))
        else:
            monkeypatch.setattr(owner, name, watched(whole))
    rows = torch.stack([random_tokens(90, seed) for seed in (1, 2)])
    expected = exported(rows, use_cache=False).logits
    repeated.clear()
    with torch.autocast("cpu", torch.bfloat16):
        first = exported(rows[:, :50], use_cache=True)
        rest = exported(rows[:, 50:], past_key_values=first.past_key_values)
    assert len(repeated) == 2 * (1 + 1 + 1 + 1) and all(repeated)
    assert first.past_key_values.states[3]["k"].dtype == torch.bfloat16
    assert 0 < (torch.cat([first.logits, rest.logits], 1) - expected).std() < 0.1 * expected.std()


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, as PEFT puts in its place."""

    def __init__(self, layer):
        super().__init__()
        sizes = (layer.in_features, 2), (2, layer.out_features)
        self.layer, (self.down, self.up) = layer, (nn.Linear(*each, bias=False).to(layer.weight) for each in sizes)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.usefixtures("without_and_with_kernels")
def test_adapters_on_all_projections():
    """They act as the same change of the weights does, whole and with a cache, and get gradients."""
    _, exported = pair(PATTERN)
    plain = {name: x for name, x in exported.model.named_modules() if isinstance(x, nn.Linear)}
    torch.manual_seed(0)
    row = random_tokens(90)[None]
    for name, layer in plain.items():
        exported.model.set_submodule(name, Adapted(layer))
    adapters = [x for name, x in exported.named_parameters() if "down" in name.split(".") or "up" in name.split(".")]
    assert len(adapters) == 2 * len(plain) == 2 * (7 + 5 * 3 + 4 * 4 + 1)
    with torch.no_grad():
        first = exported(row[:, :60], use_cache=True)
        rest = exported(row[:, 60:], past_key_values=first.past_key_values).logits
    loss = exported.train()(row, labels=row).loss
    loss.backward()
    assert all(x.grad.any() for x in adapters)
    for name, layer in plain.items():
        adapted = exported.model.get_submodule(name)
        layer.weight.data += adapted.up.weight @ adapted.down.weight
        exported.model.set_submodule(name, layer)
    expected = exported.eval()(row, labels=row)
    assert torch.allclose(torch.cat([first.logits, rest], 1), expected.logits, rtol=0, atol=1e-9)
    assert torch.allclose(loss, expected.loss, rtol=1e-6)


def gradients_by_kernels(pattern, device, autocast, monkeypatch):
    """(Of the plain form in fp32, of the plain form and by megahybrid_kernels, both under autocast or not)."""
    exported = trainable(pattern, torch.float32).to(device)
    for name, weight in exported.named_parameters():
        if name.endswith(("q_conv", "k_conv")):
            weight.data *= 3  # short vectors are divided by their length, which makes much of their rounding
    row, labels, ways = packed_row((33, 5, 21))
    inputs = {"input_ids": row, "labels": labels, **ways["position_ids"]}
    inputs = {name: x.to(device) for name, x in inputs.items()}

    def found(kernels, enabled):
        for module in (layers, inference, gdn):
            monkeypatch.setattr(module, "takes_kernels", lambda _: kernels)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            return gradients(exported, exported(**inputs).loss)

    return found(False, False), found(False, autocast), found(True, autocast)


def require_near(exact, plain, found):
    """Gradients found are about as near to the exact ones as those of the plain form, which are so near that a term too
    few would show: mostly within 2 %, a few within 6 %."""
    for name, x in exact.items():
        rounding = (plain[name] - x).norm()
        assert rounding <= 0.08 * x.norm(), name
        assert (found[name] - x).norm() <= max(1e-3 * x.norm(), 3 * rounding), name


@pytest.mark.parametrize("pattern", [*PATTERN])
def test_gradients_under_autocast(pattern, monkeypatch):
    require_near(*gradients_by_kernels(pattern, "cpu", True, monkeypatch))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="puts CPU tensors through the interpreter")
@pytest.mark.parametrize("pattern", [*PATTERN])
def test_triton(pattern, monkeypatch):
    for op in OPS:
        monkeypatch.setattr(importlib.import_module(f"megahybrid_kernels.{op}"), "takes_triton", lambda *_: True)
    expected, _, found = gradients_by_kernels(pattern, "cpu", False, monkeypatch)
    assert all((found[name] - x).norm() <= 1e-4 * x.norm() for name, x in expected.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("pattern", [*PATTERN])
def test_on_a_gpu(pattern, autocast, monkeypatch):
    require_near(*gradients_by_kernels(pattern, "cuda", autocast, monkeypatch))
