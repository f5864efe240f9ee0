"""A run's identity: what decides its result, and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from megahybrid.config import Config
from megahybrid.config.branching import branch_point
from megahybrid.config.task_sources import text_sources
from megahybrid.data.prepared import data_identity, find_prepared, open_prepared
from megahybrid.key import unusual
from megahybrid.training.resume import initial_weights, meaning

_NO_RESULT = (
    *("run.", "tracking.", "checkpoint.", "evaluate."),
    *("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.sequence", "parallel.context"),
    "parallel.zero_stage",
    *("train.micro_batch_size", "train.recompute", "train.cuda_graph"),
    *("train.watch.", "train.trace.", "train.log_every", "train.validate_every"),
    *("train.resume_from", "train.branch_from"),
    # Of the data their own identity says all.
    "data.",
)
"""Keys, among those that may change when a run goes on, that do not change what it comes to."""


def identify(config: Config, data: str | None) -> str:
    """16 hex digits: equal for configurations that train the same model to the same loss, whatever the layout. Keys
    whose value is their default do not count: a key that the schema gets later changes no run's identity.

    Args:
        config: a run's; of a branch with train.branch_from, whose run directory is named by its trunk's identity.
        data: the data's identity.

    Raises UserError where there is no checkpoint of train.init_from.
    """
    facts = {name: value for name, value, _ in unusual(config) if not name.startswith(_NO_RESULT)} | meaning(config)
    if (initial := initial_weights(config)) is not None:  # what it takes of that, wherever it lies
        from megahybrid.training import checkpoint  # these load torch
        from megahybrid.training.zero import WEIGHTS

        there = checkpoint.read_facts(initial)
        weights = {name: each for name, each in there["files"].items() if name.startswith(f"{WEIGHTS}-")}
        facts["train.init_from"] = weights, there.get("regulators")
    point = branch_point(config.train)
    facts["branch"] = point and (point[0].name, point[1])
    text = json.dumps([data, facts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def find_data(config: Config) -> str | None:
    """The identity of a recipe's data; None where they are not prepared yet. Raises UserError where they do not fit."""
    if config.data.sources and not text_sources(config):
        return data_identity(config, None)
    if config.data.remote is None and find_prepared(Path(str(config.data.path)).expanduser()) is None:
        return None
    return data_identity(config, open_prepared(config))
