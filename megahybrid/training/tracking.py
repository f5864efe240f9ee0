"""Weights & Biases beside metrics.jsonl: never a reason for a run to stop or to wait."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from megahybrid import code_version
from megahybrid.config.schema import Config

log = logging.getLogger(__name__)


class Tracker:
    """One W&B run over all resumes, logged on the axis of tokens; silent where tracking is off or W&B fails."""

    def __init__(self, config: Config | None, run_id: str | None):
        """Start or continue the run with this id; None for `config` on processes that do not log."""
        self.run = None
        if config is not None and config.tracking.wandb != "disabled":
            self.run = _start(config, run_id, config.tracking.wandb)
            if self.run is None and config.tracking.wandb == "online":
                self.run = _start(config, run_id, "offline")
        self.id: str | None = self.run.id if self.run else run_id

    def log(self, metrics: dict[str, Any]) -> None:
        """Log one step's metrics; per-head values as mean and histogram a layer."""
        if self.run is None:
            return
        try:
            self.run.log(_flat(metrics))
        except Exception as error:
            log.warning("W&B stopped taking metrics (%s); they go on in metrics.jsonl.", error)
            self.run = None

    def finish(self) -> None:
        """Close the run, waiting at most half a minute."""
        if self.run is None:
            return
        try:
            self.run.finish()
        except Exception as error:
            log.warning("W&B could not be closed cleanly: %s", error)


def _start(config: Config, run_id: str | None, mode: str):
    try:
        import wandb

        run = wandb.init(
            project=config.tracking.project,
            name=config.tracking.name or config.run.dir.rstrip("/").rsplit("/", 1)[-1],
            id=run_id,
            resume="allow" if run_id and mode == "online" else None,
            dir=config.run.dir,
            mode=mode,
            group=config.tracking.group,
            tags=config.tracking.tags or None,
            config={**dataclasses.asdict(config), "code_version": code_version()},
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=20,
                finish_timeout=30,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
        return run
    except Exception as error:
        log.warning("W&B did not start in %s mode (%s).", mode, error)
        return None


def _flat(metrics: dict[str, Any]) -> dict[str, Any]:
    import wandb

    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, list):
            for number, heads in enumerate(value):
                flat[f"{key}/layer_{number}"] = sum(heads) / len(heads)
                flat[f"{key}_heads/layer_{number}"] = wandb.Histogram(heads)
        else:
            flat[key] = value
    return flat
