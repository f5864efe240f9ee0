"""The gates of retention scores: what a recipe may name is what the op takes."""

from dataclasses import fields
from typing import get_args

from megahybrid.mixers.lte import LTEConfig
from megahybrid_kernels.lte_attention import Gate


def test_a_recipe_names_the_ops_gates():
    (gate,) = (field for field in fields(LTEConfig) if field.name == "gate")
    assert set(gate.metadata["key"].choices) == set(get_args(Gate))
