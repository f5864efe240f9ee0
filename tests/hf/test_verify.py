"""That the verification of a conversion fails for what a conversion may get wrong, one fault at a time."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from megahybrid.errors import UserError
from megahybrid.hf import verify
from megahybrid.hf.naming import exported_config, exported_name
from megahybrid.model.stack import build
from tests.model import tiny

TOKENIZER = SimpleNamespace(document_id=0, of_numbers=False, vocab_size=128, encode=lambda text: list(text.encode()))

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def sized(process_group):
    """A configuration whose limits the text does not reach, but LTE's window: its buffer never fills."""
    config = tiny.config("GLSNL")
    model = replace(
        config.model,
        vocab_size=128,
        lte=replace(config.model.lte, window_size=100, buffer_size=200, sink_size=4),
        nsa=replace(config.model.nsa, num_blocks=10, window_size=300),
        attention=replace(config.model.attention, window_size=300),
    )
    return replace(config, model=model)


@pytest.fixture
def verified(sized):
    """Verifies a new model whose exported form `damage` has changed; returns what is said, each line or the refusal."""

    def verified(damage=lambda exported: None):
        trained = build(sized, "cpu", torch.float64).requires_grad_(False)
        exported, said = verify.converted_model(trained, sized), []
        damage(exported)
        try:
            verify.verify(trained, exported, sized, TOKENIZER, said.append)
        except UserError as refusal:
            said.append(str(refusal))
        return said

    return verified


def test_both_comparisons_agree(verified):
    whole, nats, close = verified()
    assert whole.startswith("Logits of 296 tokens, whole") and nats.endswith("nats a token of text")
    assert "with lte.window_size = 16, lte.buffer_size = 12, lte.sink_size = 4, nsa.num_blocks = 4" in close


@pytest.mark.parametrize("layer, head, name", [(4, 1, "conv0_weight"), (4, 0, "conv2_bias"), (1, 1, "projection_bias")])
def test_one_heads_router_of_one_layer(verified, layer, head, name):
    def damage(exported):
        weight = exported.get_parameter(f"model.layers.{layer}.mixer.router.{name}")
        weight.data.unflatten(0, (2, -1))[head].normal_(generator=torch.Generator().manual_seed(0))

    assert "differ by up to" in verified(damage)[-1]


@pytest.mark.parametrize(
    "section, key",
    [
        *(("lte", "window_size"), ("lte", "sink_size"), ("lte", "buffer_size")),
        *(("nsa", "num_blocks"), ("nsa", "window_size"), ("attention", "window_size")),
    ],
)
def test_a_limit_that_the_exported_code_misses_by_one(verified, monkeypatch, section, key):
    """At the model's own sizes nobody sees it."""
    real = verify._resized_export

    def missed(exported, config):
        limits = getattr(config.model, section)
        wrong = replace(limits, **{key: getattr(limits, key) - 1})
        return real(exported, replace(config, model=replace(config.model, **{section: wrong})))

    monkeypatch.setattr(verify, "_resized_export", missed)
    whole, _, close, refusal = verified()
    assert whole.startswith("Logits of 296 tokens, whole") and close.startswith("Logits of 256 tokens with ")
    assert refusal.startswith("The converted model's logits with ") and "differ by up to" in refusal


@pytest.fixture
def refused(verified, monkeypatch):
    """Requires that an exported model is refused one of whose layers `change` has made wrong once limits are close."""
    real = verify._resized_export

    def refused(layer, change):
        def changed(exported, config):
            exported = real(exported, config)
            change(exported.model.layers[layer].mixer)
            return exported

        monkeypatch.setattr(verify, "_resized_export", changed)
        *said, refusal = verified()
        assert len(said) == 3 and "differ by up to" in refusal and "inf" not in refusal

    return refused


@pytest.mark.parametrize("layer", [1, 4])
def test_a_buffer_whose_values_change_places_in_one_layer(refused, layer):
    """Which steps alone read."""

    def scrambled(mixer):
        def forward(x, positions, state, real=mixer.forward):
            output, after = real(x, positions, state)
            return output, after | {"buffer_v": after["buffer_v"].roll(1, 2)}

        mixer.forward = forward

    refused(layer, scrambled)


def test_one_query_that_selects_a_wrong_block_for_one_head(refused):
    def wrong(mixer):
        def selected(q, positions, scores, state, real=mixer.selected):
            scores = scores.clone()
            scores[:, 1, positions[0] == 200] *= -1
            return real(q, positions, scores, state)

        mixer.selected = selected

    refused(3, wrong)


def test_an_embedding_that_the_text_does_not_need(sized):
    config = replace(sized, model=replace(sized.model, pattern="GL", tie_embeddings=False))
    trained, said = build(config, "cpu", torch.float64).requires_grad_(False), []
    exported = verify.converted_model(trained, config)
    verify.verify(trained, exported, config, TOKENIZER, said.append)
    exported.model.embedding.weight.data[127, 3] += 1e-3
    with pytest.raises(UserError, match=r"model\.embedding\.weight is not what the model has"):
        verify.verify(trained, exported, config, TOKENIZER, said.append)
    assert len(said) == 6


def test_a_wrong_config_json(verified):
    def damage(exported):
        exported.config.lte["buffer_size"] += 1

    (refusal,) = verified(damage)
    assert "config.json has lte = " in refusal


def test_routers_that_have_learnt_to_keep_nothing(verified, sized, monkeypatch):
    """Without being balanced they would leave no choice to compare."""
    real = verify.converted_model

    def unwilling(trained, config):
        for layer in (1, 4):
            trained.get_parameter(f"layers.{layer}.mixer.router.projection_bias").fill_(-1000)
        return real(trained, config)

    monkeypatch.setattr(verify, "converted_model", unwilling)
    assert len(verified()) == 3
    monkeypatch.setattr(verify, "_balance", lambda *_: None)
    assert verified()[-1].startswith("It cannot be verified that model.lte.buffer_size is kept to")


def test_limits_that_nothing_shows_are_refused(verified, monkeypatch):
    """Layers that have learnt to add nothing: their limits change no logit."""
    real = verify.converted_model

    def silent(trained, config):
        for layer in (1, 4):
            trained.get_parameter(f"layers.{layer}.mixer.o_proj.weight").zero_()
        return real(trained, config)

    monkeypatch.setattr(verify, "converted_model", silent)
    *_, close, refusal = verified()
    assert close.startswith("Logits of 256 tokens with ")
    assert refusal == (
        "It cannot be verified that model.lte.window_size is kept to, since with one more no logit of this model "
        "changes, so nothing was written; --no-verify converts it as it is."
    )


@pytest.fixture
def folder(tmp_path, sized):
    """An exported model's tensors in two files, and what reads them."""
    config = replace(sized, model=replace(sized.model, pattern="GL"))
    trained = build(config, "cpu", torch.float64)
    tensors = {exported_name(name): weight.data for name, weight in trained.named_parameters()}
    later = tensors.pop("model.final_norm.weight")
    files = {"one": tensors, "two": {"model.final_norm.weight": later}}

    def read():
        paths = [tmp_path / f"{name}.safetensors" for name in files]
        for path, content in zip(paths, files.values(), strict=True):
            save_file(content, path)
        return verify.exported_model(exported_config(config), paths)

    assert torch.equal(read().model.final_norm.weight, later)
    return files, read


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x["two"].update(other=torch.zeros(2)), r"'two\.safetensors' holds other \[2\], but .* no such"),
        (lambda x: x["two"].update(x["one"]), r"'two\.safetensors' holds model\..*, but it is there twice"),
        (lambda x: x["two"].clear(), r"files lack model\.final_norm\.weight"),
        (lambda x: x["one"].update({NAME: x["one"][NAME].T.contiguous()}), rf"holds {NAME} .*, but the model has \["),
    ],
)
def test_tensors_that_have_no_place(folder, change, said):
    files, read = folder
    change(files)
    with pytest.raises(UserError, match=said):
        read()
