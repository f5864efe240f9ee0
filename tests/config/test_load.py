from pathlib import Path

import pytest
import yaml

from megahybrid.config import load_config, save_config
from megahybrid.errors import UserError

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def test_overrides_win_and_the_saved_config_loads_as_the_same(tmp_path):
    config = load_config(QUICKSTART, ["train.steps=7", "model.gdn.num_heads=2", "data.sources.python.path=here"])
    assert (config.train.steps, config.model.gdn.num_heads, config.data.sources["python"].path) == (7, 2, "here")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.patern=GL", "did you mean model.pattern?"),
        ("train.step=3", "did you mean train.steps?"),
        ("trian.steps=3", "did you mean train?"),
        ("train.learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("steps=3", "did you mean train.steps or train.trace.steps?"),
        ("optimizer.lr=1e-3", "optimizer has learning_rate, warmup_steps, schedule,"),
        ("data.sources.python.include=[*.py]", "The value of 'data.sources.python.include=[*.py]' is not valid YAML"),
        ("run.dir=${", "run.dir: no viable alternative"),
        ("data.sources.python.glob=x", "Unknown configuration key 'data.sources.python.glob'"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps is 0; it must be greater than 0"),
        ("train.steps=-3", "must be greater than 0"),
        ("train.dtype=fp8", "choose one of bf16, fp32"),
        ("model.pattern=(GX)*2", "unknown letter 'X'"),
        ("model.lte.window_size=6", "larger than the router's margin (6)"),
        ("model.lte.buffer_size=3", "must hold the sinks"),
        ("model.lte.gate=displacing", "without model.lte.train_cap: set that to true, or the gate to counterfactual"),
        ("model.lte.conv_size=4", "odd"),
        ("model.lte.loss.update_interval=1", "at least 2"),
        ("model.attention.num_kv_heads=3", "must be a multiple"),
        ("train.global_batch_size=9", "must be a multiple"),
        ("parallel.zero_stage=0", "zero_stage"),
        ("optimizer.betas=[0.9,1.0]", "below 1"),
        ("steps", "write key=value"),
        ("run=3", "run is a section"),
        ("model.lte=null", "model.lte is a section"),
        ("model.hidden_size=null", "model.hidden_size"),
        ("data.sources=[a]", "data.sources holds named entries"),
        ("optimizer.betas={a: 1}", "optimizer.betas is a list"),
        ("data.path=${nothing}", "nothing"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(override, reason):
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, [override])
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message


def test_window_just_above_the_margin_is_accepted():
    assert load_config(QUICKSTART, ["model.lte.window_size=7"]).model.lte.window_size == 7


@pytest.mark.parametrize(
    ("text", "reason"),
    [("model: [", "not valid YAML"), ("- a", "sections"), ("model: 3", "model"), ("", "does not set")],
)
def test_bad_files_are_refused(tmp_path, text, reason):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=reason):
        load_config(recipe)


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no recipe '.*absent\.yaml'"):
        load_config(tmp_path / "absent.yaml")


def test_a_missing_key_is_named(tmp_path):
    tree = yaml.safe_load(QUICKSTART.read_text())
    del tree["train"]["seq_length"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"does not set train\.seq_length"):
        load_config(recipe)
