"""Which working copies ZeRO-3 splits over the replicas, and what a GPU has whole beside its pieces."""

from __future__ import annotations

import math

from megahybrid.config.schema import Config
from megahybrid.model.settings import Settings
from megahybrid.parallel.parameters import ParameterSpec
from megahybrid.scaling.parameters import parameter_specs

WHOLE = 10**9
"""Of a rank's parameters embedding, output layer and vectors always stay whole; layers do, too, up to so many in all or
half of them, if that is less."""


def is_split(spec: ParameterSpec) -> bool:
    """Whether a parameter of a split layer is: vectors are little, and a collective for little takes as long."""
    return spec.weight_decay


def split_matrices(config: Config, replicas: int) -> dict[int, int]:
    """How many elements a tensor parallel rank has of the matrices of each layer that is split over all that hold the
    same weights: as many layers as must be, spread evenly, so that there is time to gather one beside those before it.
    Embedding, output layer and vectors are not among them."""
    if config.parallel.zero_stage < 3 or replicas == 1:
        return {}
    sizes, total = _matrices(config), _parameters(config)
    count, room = len(sizes), min(WHOLE, total // 2) - (total - sum(sizes))
    whole = max(0, room) // max(sizes)
    return {n: sizes[n] for n in range(count) if n * whole // count == (n + 1) * whole // count}


def kept_whole(config: Config, replicas: int) -> float:
    """Parameters that stay whole, less the pieces of them that a GPU has in any case."""
    if not (split := split_matrices(config, replicas)):
        return 0
    return (_parameters(config) - sum(split.values())) * (1 - 1 / replicas)


def gathered(config: Config, replicas: int) -> float:
    """Parameters of which a GPU has working copies beside its pieces in a step: those, and two split layers."""
    return kept_whole(config, replicas) + sum(sorted(split_matrices(config, replicas).values())[-2:])


def _matrices(config: Config) -> list[int]:
    """Elements that one tensor parallel rank has of each layer's matrices."""
    sizes = [0] * len(Settings.of(config).pattern.letters)
    for name, spec in parameter_specs(config).items():
        part, *rest = name.split(".")
        if part == "layers" and is_split(spec):
            sizes[int(rest[0])] += math.prod(spec.local_shape(config.parallel.tensor))
    return sizes


def _parameters(config: Config) -> int:
    return sum(math.prod(spec.local_shape(config.parallel.tensor)) for spec in parameter_specs(config).values())
