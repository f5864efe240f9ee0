"""Parameters of every pipeline rank, against the layers' own counts."""

import math

import pytest

from megahybrid.config import load_config
from megahybrid.scaling.parameters import parameter_specs, parameters_by_rank


def test_without_splits_a_rank_holds_all():
    config = load_config("recipes/lalte-0.4b.yaml")
    assert parameters_by_rank(config) == [sum(math.prod(spec.shape) for spec in parameter_specs(config).values())]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pipeline", [2, 3])
def test_over_a_pipeline_a_tied_embedding_is_held_twice(pipeline, tied):
    overrides = [f"model.tie_embeddings={tied}".lower(), f"parallel.pipeline={pipeline}"]
    config = load_config("recipes/lalte-0.4b.yaml", overrides)
    whole = sum(spec.full_size for spec in parameter_specs(config).values())
    again = config.model.vocab_size * config.model.hidden_size if tied else 0
    assert sum(parameters_by_rank(config)) == whole + again


def test_stages_hold_their_layers_embedding_and_output():
    config = load_config("recipes/transformer-0.4b.yaml", ["model.pattern=FF|F|FFF", "parallel.pipeline=3"])
    hidden, inner = 1024, 2816
    layer = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    embedding = 32000 * hidden
    assert parameters_by_rank(config) == [2 * layer + embedding, layer, 3 * layer + embedding + hidden]


def test_chunks_of_the_interleaved_schedule_alternate():
    overrides = ["model.pattern=FF|F|FFF|F", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]
    config = load_config("recipes/transformer-1.4b.yaml", overrides)
    hidden, inner, keys = 2048, 5632, 8 * 64
    layer = 2 * hidden * (hidden + keys) + 3 * hidden * inner + 2 * hidden
    embedding = 32000 * hidden  # not tied
    assert parameters_by_rank(config) == [5 * layer + embedding, 2 * layer + hidden + embedding]


def test_tensor_parallel_ranks_hold_norms_whole():
    config = load_config("recipes/transformer-0.4b.yaml", ["model.pattern=FF", "parallel.tensor=4"])
    hidden, inner = 1024, 2816
    split = 2 * (4 * hidden**2 + 3 * hidden * inner) + 32000 * hidden
    assert parameters_by_rank(config) == [split // 4 + 5 * hidden]


@pytest.mark.parametrize(("tensor", "keys"), [(1, 128), (2, 64), (4, 64), (8, 64)])
def test_ranks_beyond_the_kv_heads_hold_one_each(tensor, keys):
    config = load_config("recipes/lansa-0.4b.yaml", ["model.pattern=N", f"parallel.tensor={tensor}"])
    hidden, inner, queries = 1024, 2816, 32 * 64
    split = hidden * (2 * queries + 3 * 32) + 3 * hidden * inner + 32000 * hidden
    assert parameters_by_rank(config) == [split // tensor + 2 * hidden * keys + 3 * hidden]
