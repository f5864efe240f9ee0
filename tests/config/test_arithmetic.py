"""Whole numbers that are computed from others, and nothing else that text may hold."""

import pytest

from megahybrid.config import load_config
from megahybrid.config.arithmetic import fill, steps_of, whole
from megahybrid.errors import UserError
from tests.config.test_load import QUICKSTART


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("layers / 2", 6), ("(layers+4)*width/128", 64), ("width - 2*layers - 1", 487)]
)
def test_expressions_have_their_value(text, value):
    assert whole(text, width=512, layers=12) == value


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [
        ("2048", 1),
        ("2049", 2),
        ("300M", 146485),
        ("10.7B", 5224610),
        ("1.0e9", 488282),
        ("1_000_000", 489),
        ("1T", 488281250),
    ],
)
def test_steps_read_at_least_so_many_tokens(tokens, steps):
    assert steps_of(tokens, 2048) == steps


@pytest.mark.parametrize("tokens", ["", "0", "-5", "ten", "5 apples", "1e999", "3m", "0.0B", "nan"])
def test_what_is_no_number_of_tokens_is_refused(tokens):
    with pytest.raises(UserError, match="no number of tokens; write one such as"):
        steps_of(tokens, 2048)


def test_templates_are_filled():
    assert fill("(GL)*{layers/2}F{1}", layers=6) == "(GL)*3F1"
    assert fill("(GL)*3", layers=6) == "(GL)*3"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers/5", "is 2.4 at layers 12, no whole number of at least 1"),
        ("layers-12", "is 0 at layers 12"),
        ("1/(layers-12)", "divides by 0"),
        ("", "cannot be computed; write layers, whole numbers"),
        ("__import__('os')", "cannot be computed"),
        ("layers.real", "cannot be computed"),
        ("9**9**9", "cannot be computed"),
        ("2.5*layers", "cannot be computed"),
        ("'a'*3", "cannot be computed"),
        ("True", "cannot be computed"),
        ("depth", "cannot be computed"),
        ("(" * 99, "cannot be computed"),
        ("1+" * 60 + "1", "cannot be computed"),
    ],
)
def test_anything_else_is_refused(text, said):
    with pytest.raises(UserError) as caught:
        whole(text, layers=12)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipes_compute_too():
    config = load_config(QUICKSTART, ["model.attention.num_heads=${whole:${model.hidden_size}/64}"])
    assert config.model.attention.num_heads == 2
    with pytest.raises(UserError, match=r"model.attention.num_heads: .*is 1.28, no whole number"):
        load_config(QUICKSTART, ["model.attention.num_heads=${whole:${model.hidden_size}/100}"])


def test_recipes_count_tokens_by_the_batch_that_they_end_up_with():
    overrides = ["train.steps=${steps:1M}", "optimizer.warmup_steps=${steps:100_000}"]  # of 4 samples of 512 tokens
    config = load_config(QUICKSTART, overrides)
    assert (config.train.steps, config.optimizer.warmup_steps) == (489, 49)
    assert load_config(QUICKSTART, [*overrides, "train.global_batch_size=8"]).train.steps == 245


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=${steps:lots}", r"train.steps: .*'lots' is no number of tokens"),
        ("train.steps=${steps:}", r"train.steps: .*takes one number of tokens"),
        ("train.steps=${steps:1B,2}", r"train.steps: .*takes one number of tokens"),
        ("train.global_batch_size=0", r"train.global_batch_size"),
        ("train.seq_length=${steps:1M}", r"train.s"),
    ],
)
def test_what_gives_no_steps_is_a_sentence_that_names_the_key(override, said):
    with pytest.raises(UserError, match=said) as caught:
        load_config(QUICKSTART, ["train.steps=${steps:1M}", override])
    assert "lambda" not in str(caught.value) and "\n" not in str(caught.value)
