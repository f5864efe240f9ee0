"""The model's parameters, known before anything is started, and how many of them every pipeline rank holds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from megahybrid.config.schema import Config
from megahybrid.model.stack import Stack
from megahybrid.parallel.parameters import ParameterSpec
from megahybrid.scaling.stages import layer_ranks

_specs: dict[str, dict[str, ParameterSpec]] = {}


def parameter_specs(config: Config) -> dict[str, ParameterSpec]:
    """What is known of every parameter of the whole model, by name; needs no process group."""
    model = repr(config.model)  # nothing else says it, and a plan asks for many layouts
    if model not in _specs:
        with _unsplit(), torch.device("meta"):
            _specs[model] = {name: parameter.spec for name, parameter in Stack(config).named_parameters()}
    return _specs[model]


def parameters_by_rank(config: Config) -> list[int]:
    """Number of parameters that one tensor parallel rank of every pipeline rank holds.

    Over a pipeline a tied embedding is held twice, by the first and by the last rank, each with its gradient and
    optimizer state.
    """
    counts, ranks = [0] * config.parallel.pipeline, layer_ranks(config)
    for name, spec in parameter_specs(config).items():
        for rank in _holders(config, name, ranks):
            counts[rank] += math.prod(spec.local_shape(config.parallel.tensor))
    return counts


def _holders(config: Config, name: str, ranks: list[int]) -> set[int]:
    """Pipeline ranks that hold a parameter; `ranks` are the layers'."""
    part, *rest = name.split(".")
    if part == "layers":
        return {ranks[int(rest[0])]}
    last = config.parallel.pipeline - 1
    if part == "embedding":
        return {0, last} if config.model.tie_embeddings else {0}
    return {last}


@contextlib.contextmanager
def _unsplit() -> Iterator[None]:
    """Where no process groups were made, let layers take their whole parameters without any: groups, and DeepSpeed's
    import with them, cost seconds that a plan does not need."""
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    parallel_state.set_tensor_model_parallel_world_size(1)
    parallel_state.set_tensor_model_parallel_rank(0)
    try:
        yield
    finally:  # these would also override groups that are made later
        parallel_state.set_tensor_model_parallel_world_size(None)
        parallel_state.set_tensor_model_parallel_rank(None)
