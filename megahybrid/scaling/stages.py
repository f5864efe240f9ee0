"""Which layers every pipeline stage holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import Config
from megahybrid.key import derived
from megahybrid.mixers.counting import linear
from megahybrid.scaling.flops import layer
from megahybrid.scaling.hours import utilisation

_OUTPUT = 0.62
"""Utilisation of the output layer with the loss: docs/performance/small-ops.md, 32,768 tokens in 85.5 ms."""


def stage_layers(config: Config) -> list[range]:
    """Layers of every model chunk in the order in which a token passes them: parallel.pipeline of them, times
    parallel.virtual_pipeline; chunk c belongs to pipeline rank c % parallel.pipeline.

    A `|` in the pattern says where they begin. Without it the costliest chunk is as cheap as can be, by `layer_costs`.
    """
    pattern, parallel = parse_pattern(config.model.pattern), config.parallel
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if chunks == 1:
        return [range(len(pattern.letters))]
    if pattern.stage_starts:
        return [range(*pair) for pair in itertools.pairwise((0, *pattern.stage_starts, len(pattern.letters)))]
    return balanced(layer_costs(config), chunks)


def layer_costs(config: Config) -> list[float]:
    """Time of every layer, the output layer and the loss counted with the last one: FLOPs a token of the forward pass
    by the utilisation that was measured of such layers."""
    model, length = derived(config.model), config.train.seq_length
    costs = [
        sum(layer(model, letter, length).values()) / utilisation(model.hidden_size, letter)
        for letter in parse_pattern(model.pattern).letters
    ]
    costs[-1] += linear(model.hidden_size, model.vocab_size) / _OUTPUT
    return costs


def layer_ranks(config: Config) -> list[int]:
    """The pipeline rank that holds each layer."""
    return [chunk % config.parallel.pipeline for chunk, layers in enumerate(stage_layers(config)) for _ in layers]


def balanced(costs: Sequence[float], parts: int) -> list[range]:
    """The split of a sequence into `parts` consecutive, non-empty ranges whose largest sum is as small as possible."""
    before = [0.0, *itertools.accumulate(costs)]
    # best[n]: the largest sum of the first n costs in the parts so far; cuts[p][n]: where the last of p parts begins.
    best, cuts = [0.0] + [math.inf] * len(costs), []
    for _ in range(parts):
        choices = [
            min(((max(best[cut], before[end] - before[cut]), cut) for cut in range(end)), default=(math.inf, 0))
            for end in range(len(costs) + 1)
        ]
        best, starts = (list(column) for column in zip(*choices, strict=True))
        cuts.append(starts)
    ranges, end = [], len(costs)
    for starts in reversed(cuts):
        ranges.append(range(starts[end], end))
        end = starts[end]
    return ranges[::-1]
