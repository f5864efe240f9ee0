"""Branches: new runs that begin with all the state of a checkpoint of another run, their trunk.

A trunk of schedule wsd serves all lengths whose decay begins within its own constant part: a branch of D steps from
`decay_start(optimizer, D)` is the run of D steps from scratch.
"""

from __future__ import annotations

import re
from pathlib import Path

from megahybrid.config.schema import OptimizerConfig, TrainConfig
from megahybrid.errors import UserError


def branch_point(train: TrainConfig) -> tuple[Path, int] | None:
    """The run directory and the step that train.branch_from names, None where it is left out. Raises UserError for
    what is not RUN@STEP."""
    if train.branch_from is None:
        return None
    run, _, step = train.branch_from.rpartition("@")
    if not run or not re.fullmatch("[0-9]+", step):
        raise UserError(
            f"train.branch_from is '{train.branch_from}'; write RUN@STEP, the directory of a run and the step of one "
            "of its checkpoints."
        )
    return Path(run), int(step)


def decay_start(optimizer: OptimizerConfig, steps: int) -> int:
    """The last step of wsd before its decay in a run of `steps`: the decay takes a whole number of steps, at least
    one, so that up to here no rate depends on `steps`."""
    return steps - max(1, round(optimizer.decay_fraction * steps))
