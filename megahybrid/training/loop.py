"""The training loop: data, steps, validation, metrics and checkpoints, from wherever the run stands."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megahybrid.config import Config, save_config
from megahybrid.data.loader import TrainingData, validation_batches
from megahybrid.errors import UserError
from megahybrid.model.stack import build
from megahybrid.parallel import groups
from megahybrid.training import checkpoint
from megahybrid.training.checkpoint import Position
from megahybrid.training.engine import Engine, StepResult
from megahybrid.training.run_directory import RunDirectory, duration
from megahybrid.training.tracking import Tracker

Report = Callable[[str], None]


def train(config: Config, report: Report = print) -> None:
    """Train the configuration to its last step, from its newest checkpoint if there is one.

    Raises UserError for what the configuration, the data or a checkpoint make impossible.
    """
    groups.initialize(config.parallel, config.train.seed)
    run = RunDirectory(config.run.dir)
    say = report if groups.is_main() else _nothing
    start = checkpoint.find(run.path)
    if start is not None and checkpoint.read_facts(start)["step"] >= config.train.steps:
        say(f"{run.path} has done its {config.train.steps} steps; a larger train.steps goes on from there.")
        return
    trainer = Trainer(config, run, start, say)
    try:
        trainer.run_to_the_end()
    except BaseException as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        trainer.write_status("failed", reason)
        raise
    finally:
        trainer.tracker.finish()


class Trainer:
    """A run in progress: built at the position of a checkpoint, or at the start."""

    def __init__(self, config: Config, run: RunDirectory, start: Path | None, say: Report):
        self.config, self.run, self.say = config, run, say
        replica, replicas = groups.data_parallel()
        # Data first: what is wrong with it is found before anything is written.
        self.data = TrainingData(config, replica, replicas, consumed=0)
        self.validation = validation_batches(config, replica, replicas)
        self.engine = Engine(config, build(config, groups.device()))
        self.position = Position(0, 0)
        if start is not None:
            self.position = checkpoint.load(start, self.engine)
            self.data.seek(self.position.consumed)
            say(f"Going on from {start}.")
        if groups.is_main():
            run.cut_metrics(self.position.step)
            save_config(config, run.config)
        self.tracker = Tracker(config if groups.is_main() else None, self.position.tracking_id)
        self.tokens_per_step = config.train.global_batch_size * config.train.seq_length

    def run_to_the_end(self) -> None:
        """All remaining steps, with validations and checkpoints on the way and at the end."""
        train, every = self.config.train, self.config.checkpoint.every
        self.write_status("running")
        began = time.perf_counter()
        first = self.position.step
        for step in range(first + 1, train.steps + 1):
            started = time.perf_counter()
            result = self.engine.step(self.data.next_step(), step)
            seconds = time.perf_counter() - started
            self.position = Position(step, self.data.consumed, self.tracker.id)
            metrics = self._metrics(result, seconds)
            if step == train.steps or (train.validate_every and step % train.validate_every == 0):
                metrics["validation_loss"] = self.engine.validate(self.validation)
            self._record(metrics)
            if step == first + 1 or step % train.log_every == 0 or "validation_loss" in metrics:
                left = (time.perf_counter() - began) / (step - first) * (train.steps - step)
                self.say(_line(metrics, train.steps, left))
            if step == train.steps or step % every == 0:
                checkpoint.save(self.run.checkpoints, self.engine, self.position, self.data.prepared.tokenizer_file)
                self.write_status("running")
        self.write_status("done")

    def write_status(self, state: str, reason: str = "") -> None:
        """Write status.json, on the main process."""
        if groups.is_main():
            self.run.write_status(state, self.position.step, self.config.train.steps, reason)

    def _record(self, metrics: dict[str, Any]) -> None:
        if groups.is_main():
            self.run.log(metrics)
            self.tracker.log(metrics)

    def _metrics(self, result: StepResult, seconds: float) -> dict[str, Any]:
        metrics: dict[str, Any] = {
            "step": self.position.step,
            "tokens": self.position.step * self.tokens_per_step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_second": self.tokens_per_step / seconds,
        }
        if self.engine.lte_layers:
            metrics["retention_loss"] = result.retention_loss
            metrics["kept"] = self.engine.controller.kept_now.tolist()
            metrics["lambda"] = self.engine.controller.lambdas.tolist()
        return metrics


def _line(metrics: dict[str, Any], steps: int, left: float) -> str:
    parts = [
        f"step {metrics['step']:>{len(str(steps))}}/{steps}",
        f"loss {metrics['loss']:.4f}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        f"{duration(left)} left",
    ]
    if "validation_loss" in metrics:
        parts.insert(2, f"validation {metrics['validation_loss']:.4f}")
    if "kept" in metrics:
        heads = [head for layer in metrics["kept"] for head in layer]
        parts.insert(-2, f"kept {min(heads):.0f}–{max(heads):.0f} a head")
    return " · ".join(parts)


def _nothing(text: str) -> None:
    pass
