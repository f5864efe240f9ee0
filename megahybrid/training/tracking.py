"""Weights & Biases beside metrics.jsonl: never a reason for a run to stop or to wait."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megahybrid import code_version
from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import Config
from megahybrid.errors import UserError
from megahybrid.files import write_json
from megahybrid.model.regulation import regulators
from megahybrid.retry import retry
from megahybrid.training import metrics_file
from megahybrid.training.probes import names

log = logging.getLogger(__name__)

_MOST_AT_ONCE = 20_000  # steps that a start sends to W&B, which takes about a millisecond each
_RARE = {"validation_loss", names.SECONDS}  # of lines that are sent whatever their step


class Tracker:
    """One W&B run over all resumes, every step in it once on the axis of tokens; silent where W&B is off or fails."""

    def __init__(self, config: Config | None, run_id: str | None, step: int = 0):
        """Start the run, or continue it after `step`; None for `config` where nothing is logged.

        `run_id` is the checkpoint's, which counts where the folder does not know better. A killed process may have
        logged steps after its last checkpoint, which are now done again, and may have lost some before it: W&B gets
        what it lacks from metrics.jsonl (of very many steps an even part), and what it has is not logged again.
        """
        self.run, self._logged, self._kept = None, 0, None
        if config is not None and config.tracking.wandb != "disabled":
            self._regulated = regulated(config)
            folder = Path(config.run.dir)
            run_id = _id_to_go_on_with(folder, run_id, step)
            self._logged = _last_step_in_files(folder / "wandb", run_id) if run_id else 0
            self.run = _start(config, run_id, config.tracking.wandb)
            if self.run is None and config.tracking.wandb == "online":
                self.run = _start(config, run_id, "offline")
        self.id: str | None = self.run.id if self.run else run_id
        if self.run is not None:
            if not self.run.settings._offline:
                self._logged = self.run.starting_step - 1 if self.run.resumed else 0
            _note_id(folder, self.id)
            self._catch_up(folder, step, config.train.log_every)

    def keep(self, metrics: dict[str, Any]) -> None:
        """Have one step's metrics sent with the next call of `send`, or at the end: W&B takes a millisecond or two."""
        self.send()
        self._kept = metrics

    def send(self) -> None:
        """Log what was kept."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self.log(kept)

    def log(self, metrics: dict[str, Any]) -> None:
        """Log one step's metrics, unless W&B has that step; regulated values as mean and histogram a layer."""
        if self.run is None or metrics["step"] <= self._logged:
            return
        try:
            self.run.log(_flat(metrics, self._regulated), step=metrics["step"])
        except Exception as error:
            log.warning("W&B stopped taking metrics (%s); they go on in metrics.jsonl.", error)
            self.run = None

    def _catch_up(self, folder: Path, step: int, log_every: int) -> None:
        try:
            if self._logged < step and (folder / "metrics.jsonl").exists():
                every = _stride(step - self._logged, log_every)
                for line in metrics_file.lines_after(folder / "metrics.jsonl", self._logged):
                    if line["step"] <= step and (line["step"] % every == 0 or not _RARE.isdisjoint(line)):
                        self.log(line)
        except OSError as error:
            log.warning("W&B does not get the steps before this start (%s).", error)

    def finish(self) -> None:
        """Send what was kept and close the run, waiting at most half a minute."""
        self.send()
        if self.run is None:
            return
        try:
            self.run.finish()
        except Exception as error:
            log.warning("W&B could not be closed cleanly: %s", error)


def add_to_summary(config: Config, folder: Path, run_id: str | None, make: Callable[[Any], dict[str, Any]]) -> None:
    """Put what `make` gives, from the module wandb, into the summary of a run's W&B run; silent where W&B is off or
    fails. Its history stays as it is, from which a later start tells how far it is.

    Args:
        config: the run's recipe.
        folder: the run directory.
        run_id: the checkpoint's, where the folder does not know better.
    """
    run_id = _id_to_go_on_with(folder, run_id, step=1)
    if config.tracking.wandb == "disabled" or run_id is None:
        return
    here = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))
    run = _start(here, run_id, config.tracking.wandb)
    if run is None and config.tracking.wandb == "online":
        run = _start(here, run_id, "offline")
    if run is None:
        return
    try:
        import wandb

        for name, value in make(wandb).items():
            run.summary[name] = value
        run.finish()
    except Exception as error:
        log.warning("W&B did not take what was to be added (%s).", error)


def _start(config: Config, run_id: str | None, mode: str):
    try:
        import wandb

        name = config.tracking.name or config.run.dir.rstrip("/").rsplit("/", 1)[-1]
        run = wandb.init(
            project=config.tracking.project,
            name=name,
            id=run_id,
            resume="allow" if run_id and mode == "online" else None,
            dir=config.run.dir,
            mode=mode,
            group=config.tracking.group or name,  # with what a rollback leaves behind
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


def _stride(steps: int, log_every: int) -> int:
    """Every how manyth of as many steps is sent: all, or evenly those whose lines have the values of every head."""
    return 1 if steps <= _MOST_AT_ONCE else log_every * -(-steps // (_MOST_AT_ONCE * log_every))


def begin_anew(folder: Path) -> None:
    """The run goes back: what follows gets an id of its own, so that no abandoned step stands as one of the run's."""
    if (folder / "wandb").is_dir():
        _note_id(folder, None)


def _id_to_go_on_with(folder: Path, saved: str | None, step: int) -> str | None:
    """The id that the last start, which may have made no checkpoint, has left, or the checkpoint's; None: a new one.

    What is begun at step 0 is another run, unless the same job begins it again.
    """
    noted = None
    with contextlib.suppress(FileNotFoundError, ValueError, UserError):
        file = folder / "wandb" / "run.json"
        noted = json.loads(retry(lambda: file.read_text(encoding="utf-8"), f"Reading {file}"))
    if noted is None:
        return saved
    submission = os.environ.get("MEGAHYBRID_SUBMISSION")
    same = submission is not None and noted.get("submission") == submission
    return noted["id"] if step or same else None


def _note_id(folder: Path, run_id: str | None) -> None:
    with contextlib.suppress(OSError):
        noted = {"id": run_id, "submission": os.environ.get("MEGAHYBRID_SUBMISSION")}
        write_json(folder / "wandb" / "run.json", noted)


def _last_step_in_files(folder: Path, run_id: str) -> int:
    """The highest step in the offline files that earlier starts have left; 0 where there is none to be read."""
    for file in sorted(folder.glob(f"offline-run-*-{run_id}/*.wandb"), reverse=True):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        last = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as inspection:
            for line in inspection.stdout:  # gigabytes of a long start: none is held
                if '"type":"history"' in line:
                    last = max(last, json.loads(line)["history"]["item"]["_step"])
        if last:
            return last
    return 0


def regulated(config: Config) -> dict[str, tuple[str, list[int]]]:
    """Of each regulated quantity's key what a layer has several values of, and the layers' numbers."""
    pattern = parse_pattern(config.model.pattern)
    return {
        quantity.key: (regulator.member, pattern.layers(letter))
        for letter, regulator in regulators(pattern).items()
        for quantity in regulator.quantities(config)
    }


def _flat(metrics: dict[str, Any], regulated: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, Any]:
    import wandb

    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, list) and key.startswith(names.PREFIX):
            for name, each in zip(names.elements(key, len(value)), value, strict=True):
                if each is not None:
                    flat[f"{key}/{name}"] = each
        elif isinstance(value, list):
            member, layers = regulated[key]
            for layer, members in zip(layers, value, strict=True):
                flat[f"{key}/layer_{layer}"] = sum(members) / len(members)
                flat[f"{key}_{member}s/layer_{layer}"] = wandb.Histogram(np_histogram=histogram(members))
        else:
            flat[key] = value
    return flat


def histogram(values: list[float], bins: int = 32) -> tuple[list[int], list[float]]:
    """Counts in `bins` equal bins from the smallest value to the largest, and their edges.

    Equal values get a range of 1. numpy's takes a few values 0.1 ms, and a step has two for each layer.
    """
    low, counts = min(values), [0] * bins
    width = (max(values) - low) / bins
    if width == 0:
        low, width = low - 0.5, 1 / bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    return counts, [low + number * width for number in range(bins + 1)]
