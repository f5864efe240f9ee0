"""Every key as text."""

import re

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.config.listing import listing
from megahybrid.errors import UserError
from megahybrid.key import keys
from tests.config.test_load import QUICKSTART


def test_every_key_has_a_meaning():
    paragraphs = re.findall(r"^(\S+): .+\n((?:    .+\n?)+)", listing(), re.MULTILINE)
    names = [name for name, _ in paragraphs]
    config = load_config(QUICKSTART)
    assert {re.sub(r"^data.sources.\w+", "data.sources.NAME", name) for name, _, _ in keys(config)} == set(names)
    assert len(names) == len(set(names)) == len(re.findall(r"^\S", listing(), re.MULTILINE))


def test_a_key_says_its_type_default_and_range():
    assert listing(["train.z_loss"]) == (
        "train.z_loss: float = 0.0; at least 0; may change when a run goes on\n"
        "    Weight of the squared log of the softmax's normaliser (PaLM, arXiv 2204.02311, section 5)."
    )
    assert listing(["model.hidden_size"]).startswith("model.hidden_size: int = (to be given); greater than 0\n")
    assert "one of bf16, fp32;" in listing(["train.dtype"])


def test_a_recipes_values_with_those_that_follow(capsys):
    assert main(["keys", "gdn.value_head_dim", "Train.Steps", "train.steps=7", "--recipe", str(QUICKSTART)]) == 0
    config = load_config(QUICKSTART)
    said = capsys.readouterr().out
    assert f"model.gdn.value_head_dim: int | None = {config.model.gdn.head_dim};" in said
    assert "train.steps: int = 7;" in said


def test_an_unknown_word_is_a_sentence():
    with pytest.raises(UserError, match="No key has warmupp or heds in its name;"):
        listing(["warmupp", "heds"])
