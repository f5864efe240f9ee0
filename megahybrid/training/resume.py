"""Which configuration keys may change when a run goes on, and the check that no other did."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megahybrid.config import Config
from megahybrid.config.pattern import parse_pattern
from megahybrid.errors import UserError

# Everything else decides the model or which samples a step reads.
MAY_CHANGE = (
    "run",
    "parallel",
    "optimizer",
    "checkpoint",
    "tracking",
    "train.micro_batch_size",
    "train.steps",
    "train.dtype",
    "train.recompute",
    "train.z_loss",
    "train.init_from",
    "train.resume_from",
    "train.skip",
    "train.validate_every",
    "train.validation_samples",
    "train.log_every",
    "model.init_std",
    "model.lte.dropout",
    "model.lte.train_cap",
    "model.lte.loss",
    "data.path",
    "data.remote",
    "data.cache",
    "data.cache_limit",
    "data.identity",
    "data.workers",
    "data.tokenizer",
)


def check_resume(saved: Config, now: Config, checkpoint: str) -> None:
    """Raises UserError for the first key that differs and may not."""
    before, after = (dict(_flat(dataclasses.asdict(config))) for config in (saved, now))
    for keys in (before, after):  # where pipeline stages begin is part of the layout
        keys["model.pattern"] = parse_pattern(keys["model.pattern"]).letters
    for key in sorted(before.keys() | after.keys()):
        source_path = key.startswith("data.sources.") and key.endswith(".path")
        if before.get(key) == after.get(key) or source_path or key.startswith(MAY_CHANGE):
            continue
        raise UserError(
            f"'{checkpoint}' was trained with {key} = {before.get(key)}, not {after.get(key)}; "
            "set it back, or train in another run.dir."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
