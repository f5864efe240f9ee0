"""Task sources of a recipe: what is refused, and what a run may change when it goes on."""

import pytest

from megahybrid.config import load_config, save_config
from megahybrid.config.task_sources import bare_tokens, task_stages
from megahybrid.errors import UserError
from megahybrid.training.resume import check_resume

RECIPE = """
run: {dir: runs/recall}
model: {pattern: GL, hidden_size: 32, vocab_size: 512, gdn: {num_heads: 1, head_dim: 16},
        attention: {num_heads: 2, head_dim: 16}, lte: {window_size: 15, buffer_size: 8}}
train: {seq_length: 128, micro_batch_size: 2, global_batch_size: 4, steps: 6}
data:
  sources:
    recall: {format: task, task: selective_mqar, weight: 1, parameters: {pairs: 4},
             stages: [{until: 8, length: 64}, {until: 16, length: 40}, {pairs: 8, answer_weight: 2}]}
"""
KEY = "data.sources.recall"
TEXT = ["data.path=data/x", "data.sources.text.path=text", "data.sources.text.weight=1"]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recall.yaml"
    path.write_text(RECIPE)
    return path


def test_each_stage_has_the_parameters_and_its_own(recipe, tmp_path):
    save_config(load_config(recipe), tmp_path / "saved.yaml")
    for path in (recipe, tmp_path / "saved.yaml"):
        stages = task_stages("recall", load_config(path).data.sources["recall"])
        found = [
            (stage.until, stage.parameters.length, stage.parameters.pairs, stage.parameters.answer_weight)
            for stage in stages
        ]
        assert found == [(8, 64, 4, 1.0), (16, 40, 4, 1.0), (None, None, 8, 2.0)]


def test_one_stage_where_the_recipe_has_none(recipe):
    (stage,) = task_stages("recall", load_config(recipe, [f"{KEY}.stages=[]"]).data.sources["recall"])
    assert (stage.until, stage.parameters.pairs) == (None, 4)


def test_bare_tokens_are_those_of_tasks_alone(recipe):
    assert bare_tokens(load_config(recipe))
    for other in (["data.tokenizer=tokenizers/a"], TEXT):
        assert not bare_tokens(load_config(recipe, other))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task=mqr", f"{KEY}.task is 'mqr', which is no task; did you mean mqar?"),
        ("task=zzzz", f"{KEY}.task is 'zzzz', which is no task; choose one of mqar, selective_mqar, "),
        ("task=null", f"{KEY}.task is not set; give the task."),
        ("parameters.pars=3", f"{KEY}.parameters.pars is no parameter of selective_mqar; did you mean pairs?"),
        ("parameters.x=3", f"{KEY}.parameters.x is no parameter of selective_mqar; choose one of length, "),
        ("stages=[3]", f"{KEY}.stages[0] is 3; give it parameters, such as"),
        ("parameters.pairs=many", f"{KEY}.parameters.pairs: Value 'many' of type 'str' could not be converted to"),
        ("parameters.pairs=0", f"{KEY}.parameters.pairs is 0; it must be greater than 0."),
        ("parameters.answer_weight=-1", f"{KEY}.parameters.answer_weight is -1.0; it must be at least 0."),
        ("parameters.answer_weight=.nan", f"{KEY}.parameters.answer_weight is nan; it must be a finite number."),
        ("parameters.length=129", "recall has samples of length 129, longer than train.seq_length (128); lower it."),
        ("stages=[{until: 5}]", f"{KEY}.stages[0].until is 5, but the last stage lasts for ever; leave it out."),
        ("stages=[{length: 64},{}]", f"{KEY}.stages[0].until is None; it must be a whole number greater than 0."),
        ("stages=[{until: 0},{}]", f"{KEY}.stages[0].until is 0; it must be a whole number greater than 0."),
        ("stages=[{until: 5},{until: 5},{}]", f"{KEY}.stages[1].until is 5; it must be a whole number greater than 5."),
        ("stages=[{until: 5.5},{}]", f"{KEY}.stages[0].until is 5.5; it must be a whole number greater than 0."),
        ("stages=[{until: 5, lenght: 3},{}]", f"{KEY}.stages[0].lenght is no parameter of selective_mqar; did you"),
        ("stages=[{until: 5},{pairs: -2}]", f"{KEY}.stages[1].pairs is -2; it must be greater than 0."),
        ("stages=[{until: 5},{length: 32, pairs: 5}]", "selective_mqar has room for 4 pairs in 32 tokens, not for 5"),
        ("stages=3", f"{KEY}.stages: "),
        ("weight=null", "A task has no size to count by; give every source in data.sources a weight."),
        ("weight=0", "Every source in data.sources has weight 0; give at least one a weight above 0."),
        ("path=text", f"{KEY}.path is for all formats but task; leave it out."),
        ("include=[a]", f"{KEY}.include is for all formats but task; leave it out."),
        ("field=body", f"{KEY}.field is for all formats but task; leave it out."),
        ("format=text", f"{KEY}.path is not set; give the folder of its files."),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(recipe, override, said):
    with pytest.raises(UserError) as caught:
        load_config(recipe, [f"{KEY}.{override}"])
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["task=mqar", "parameters.pairs=3", "stages=[{}]"])
def test_keys_of_tasks_are_refused_for_text(recipe, name):
    with pytest.raises(UserError, match=r"^data\.sources\.text\.\w+ is for the format task; leave it out\.$"):
        load_config(recipe, [*TEXT, f"data.sources.text.{name}"])


def test_text_beside_a_task_needs_a_place_and_a_weight(recipe):
    with pytest.raises(UserError, match=r"^data\.path is not set; give the folder where `prepare` writes\.$"):
        load_config(recipe, TEXT[1:])
    with pytest.raises(UserError, match=r"has weights, but not for text; give every source one, or none"):
        load_config(recipe, TEXT[:2])


def fault(recipe, before, after):
    with pytest.raises(UserError) as caught:
        check_resume(load_config(recipe, before), load_config(recipe, after), "ckpt")
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parameters.pairs=3", f"was trained with {KEY}.parameters = {{'pairs': 4}}, not {{'pairs': 3}}; set it back"),
        ("parameters.context_weight=1", f"{KEY}.parameters = "),
        ("stages=[{pairs: 8}]", f"was trained with {KEY}.stages = [{{'until': 8, 'length': 64}}, "),
        ("stages=[{until: 9, length: 64}, {until: 16, length: 40}, {pairs: 8, answer_weight: 2}]", f"{KEY}.stages = "),
        ("task=mqar", f"{KEY}.task = selective_mqar, not mqar"),
    ],
)
def test_a_run_that_goes_on_keeps_its_samples(recipe, override, said):
    assert said in fault(recipe, [], [f"{KEY}.{override}"])


def test_a_run_may_go_on_longer_and_with_what_was_left_out_written_out(recipe):
    same = [
        "train.steps=1000",
        f"{KEY}.weight=3",
        f"{KEY}.parameters.context_weight=0",
        f"{KEY}.stages=[{{until: 8, length: 64, pairs: 4}}, {{until: 16, length: 40}}, {{pairs: 8, answer_weight: 2}}]",
    ]
    check_resume(load_config(recipe), load_config(recipe, same), "ckpt")
