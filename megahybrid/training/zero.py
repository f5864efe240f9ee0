"""ZeRO: the owner of weights, gradients and optimizer state, which are split over the replicas (stage 1, 2, 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from megahybrid.config.schema import Config
from megahybrid.devices import DTYPES
from megahybrid.parallel import groups
from megahybrid.parallel.parameters import materialize

if TYPE_CHECKING:
    from megahybrid.training.sharded import ShardedOptimizer
    from megahybrid.training.split import SplitOptimizer

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHTS, *MOMENTS)


def own(config: Config, model: nn.Module) -> ShardedOptimizer | SplitOptimizer:
    """The owner of a model on the meta device, whose working copies are made, too. Neither they nor masters have values
    until the latter get theirs through `place` and the former by `round_masters`.
    """
    split = config.parallel.zero_stage == 3
    _make_parameters(config, model, split)
    if split:
        from megahybrid.training.split import SplitOptimizer

        return SplitOptimizer(config, model)
    from megahybrid.training.sharded import ShardedOptimizer  # DeepSpeed's import takes seconds

    return ShardedOptimizer(config, model)


def _make_parameters(config: Config, model: nn.Module, split: bool) -> None:
    """Make the working copies, without values; to be split, a layer at a time and without their memory, so that no rank
    ever has them all."""
    dtype = DTYPES[config.train.dtype]
    for module in [*model.layers.values(), *(each for name, each in model.named_children() if name != "layers")]:
        materialize(module, groups.device(), dtype)
        for parameter in module.parameters() if split else ():
            parameter.data.untyped_storage().resize_(0)
