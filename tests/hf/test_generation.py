"""What transformers asks of a model beside logits: generate in all its ways, the cache, the configuration."""

import copy

import pytest
import torch
from transformers import DynamicCache

from megahybrid.hf.configuration_megahybrid import MegahybridConfig
from tests.hf.test_modeling import NO_END, padded
from tests.hf.tiny import pair, random_tokens

pytestmark = pytest.mark.usefixtures("process_group")

PATTERN = "GLSFN"
OPTIONS = {"max_new_tokens": 8, "do_sample": False, **NO_END}


@pytest.fixture
def read():
    """A model, two texts of it with their mask, and a list of how many tokens it read at a time."""
    _, exported = pair(PATTERN)
    counts = []
    exported.model.layers[0].register_forward_hook(lambda _, given, __: counts.append(given[0].shape[1]))
    return exported, *padded((30, 21)), counts


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}])
def test_every_token_is_read_once(read, options):
    model, rows, mask, counts = read
    found = model.generate(rows, attention_mask=mask, **OPTIONS, **options)
    assert sum(counts) == 30 + 7 and counts[0] == options.get("prefill_chunk_size", 30)
    expected = model.generate(
        rows, attention_mask=mask, use_cache=False, **OPTIONS, **options | {"prefill_chunk_size": None}
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_from_embeddings(read, options):
    model, rows, mask, counts = read
    expected = model.generate(rows, attention_mask=mask, **OPTIONS, **options)
    embeddings = model.get_input_embeddings()(rows)
    counts.clear()
    found = model.generate(inputs_embeds=embeddings, attention_mask=mask, **OPTIONS, **options)
    assert torch.equal(found, expected[:, 30:]) and counts == [30] + [1] * 7
    both = model.generate(rows, inputs_embeds=embeddings, attention_mask=mask, **OPTIONS, **options)
    assert torch.equal(both, expected)
    alone = model.generate(inputs_embeds=embeddings[:1], **OPTIONS, **options)  # without a mask
    assert torch.equal(alone, expected[:1, 30:])


def test_a_second_turn(read):
    """Continues from what the first one returned, and reads only what is new."""
    model, rows, _, counts = read
    first = model.generate(rows[:1], return_dict_in_generate=True, **OPTIONS)
    text, cache = torch.cat([first.sequences, random_tokens(5)[None]], 1), first.past_key_values
    expected = model.generate(text, **OPTIONS)
    counts.clear()
    assert torch.equal(model.generate(text, past_key_values=copy.deepcopy(cache), **OPTIONS), expected)
    assert counts == [6] + [1] * 7
    with pytest.raises(ValueError, match=r"The cache has 37 tokens and the text no more \(5\): give all of it"):
        model.generate(text[:, -5:], past_key_values=cache, attention_mask=torch.ones(1, 5), **OPTIONS)


def test_the_cache_forgets_all_or_nothing(read):
    model, rows, mask, _ = read
    cache = model(rows, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="cannot be taken back from a MegahybridCache"):
        cache.crop(5)
    expected = model(rows[:1]).logits
    cache.reset()
    assert cache.get_seq_length() == 0 and torch.equal(model(rows[:1], past_key_values=cache).logits, expected)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache, whose"):
        model.generate(rows, attention_mask=mask, past_key_values=DynamicCache(), **OPTIONS)
    with pytest.raises(ValueError, match="There is no token in input_ids: give one at least"):
        model(rows[:, :0])
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(rows, attention_mask=mask, prompt_lookup_num_tokens=3, **OPTIONS)


def test_what_is_returned(read):
    model, rows, mask, _ = read
    out = model(rows, attention_mask=mask, labels=rows, output_hidden_states=True)
    assert len(out.hidden_states) == 1 + len(PATTERN)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    as_tuple = model(rows, attention_mask=mask, labels=rows, output_hidden_states=True, return_dict=False)
    assert [type(part) for part in as_tuple] == [type(part) for part in out.to_tuple()] and as_tuple[0] == out.loss
    assert torch.equal(model.model(rows, attention_mask=mask, return_dict=False)[0], out.hidden_states[-1])
    written = model.generate(
        rows, attention_mask=mask, return_dict_in_generate=True, output_hidden_states=True, **OPTIONS
    )
    assert [len(step) for step in written.hidden_states] == [1 + len(PATTERN)] * 8
    model.config.output_hidden_states = True
    assert len(model(rows, attention_mask=mask).hidden_states) == 1 + len(PATTERN)
    model.config.output_hidden_states = False
    assert model(rows, attention_mask=mask).hidden_states is None
    # Of a prompt generate needs the last logits alone.
    kept = []
    model.lm_head.register_forward_hook(lambda _, __, logits: kept.append(logits.shape[1]))
    model.generate(rows, attention_mask=mask, **OPTIONS)
    assert kept == [1] * 8


@pytest.mark.parametrize("layers, heads", [("GL", (4, 2, 8)), ("N", (4, 2, 8)), ("G", (2, 2, 4))])
def test_what_tools_ask_of_a_configuration(layers, heads):
    config = pair(layers)[1].config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == heads
    assert config.num_hidden_layers == len(layers) and config.hidden_size == 16
    assert not hasattr(MegahybridConfig(), "head_dim")
    again = MegahybridConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
