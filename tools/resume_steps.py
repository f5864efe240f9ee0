"""The resume check of tools/bench_scaling: saved in one layout, gone on in others, losses as if uninterrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layouts import loss_difference, parse

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6  # half of them before the checkpoint
# As far as rounding alone takes losses apart within some steps of full learning rate.
TOLERANCES = {"fp32": 2e-6, "bf16": 1e-3}


def layouts(processes: int) -> tuple[str, list[str]]:
    """The layout that saves, the largest that fits, and those that go on: two processes and one."""
    if processes < 2:
        return "", [""]
    saving = "tensor=2,sequence=true"
    if processes >= 4:
        saving += ",pipeline=2"
    if processes >= 8:
        saving += f",data={1 << (processes // 4).bit_length() - 1}"
    return saving, ["data=2", ""]


class Resume:
    """A recipe of the same model with fewer layers, on the repository's own text; all of it in a temporary folder."""

    def __init__(self, recipe: str, overrides: Sequence[str], layers: int, processes: int, folder: Path):
        """Begins to prepare the text, beside whatever else runs.

        Args:
            layers: of the recipe's, the first that are kept, since a whole checkpoint of 1.4B is 17 GB; 0 for all.
            processes: at most.
        """
        from megahybrid.config import load_config, save_config
        from megahybrid.config.schema import SourceConfig
        from megahybrid.model.settings import Settings

        config = load_config(recipe, overrides)
        letters = Settings.of(config).pattern.letters
        replace, samples = dataclasses.replace, 8 * max(1, processes // 8)
        sources = {
            name: SourceConfig(path=str(ROOT / name), include=["*.py"]) for name in ("megahybrid", "kernels", "tests")
        }
        train = replace(
            config.train, steps=STEPS, global_batch_size=samples, micro_batch_size=1, validation_samples=2,
            validate_every=0, log_every=STEPS,
        )  # fmt: skip
        config = replace(
            config,
            model=replace(config.model, pattern="".join(letters[: layers or None])),
            train=train,
            optimizer=replace(config.optimizer, warmup_steps=1),  # so that three steps change the model
            data=replace(config.data, path=str(folder / "data"), sources=sources, tokenizer=None, remote=None),
            checkpoint=replace(config.checkpoint, every=STEPS // 2, keep=2, milestone_every=0),
            tracking=replace(config.tracking, wandb="disabled"),
        )
        self.folder, self.recipe, self.dtype = folder, folder / "recipe.yaml", config.train.dtype
        self.processes = processes
        save_config(config, self.recipe)
        with open(folder / "prepare.log", "wb") as log:
            command = [sys.executable, "-m", "megahybrid", "prepare", str(self.recipe)]
            paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
            environment = {**os.environ, "PYTHONPATH": paths}
            self._prepare = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def lines(self, run: Callable[..., Any]) -> Iterator[dict[str, Any]]:
        """One for the layout that saves and one for each that goes on.

        run: Workers.run with a timeout. Raises AssertionError for what fails.
        """
        if self._prepare.wait():
            raise AssertionError((self.folder / "prepare.log").read_text()[-600:])
        saving, others = layouts(self.processes)
        uninterrupted, seconds = self._train(run, saving, self.folder / "saved")
        losses = [line["loss"] for line in uninterrupted]
        yield {"checkpoint": "saved", "layout": saving or "one process", "seconds": seconds, "losses": losses}
        for number, layout in enumerate(others):
            folder = self.folder / f"went_on_{number}"
            adopt(self.folder / "saved", folder)
            went_on, seconds = self._train(run, layout, folder)
            found = [line["loss"] for line in went_on]
            difference = loss_difference(found, losses[STEPS // 2 :])
            yield {
                "checkpoint": f"gone on after step {went_on[0]['step'] - 1}",
                "layout": layout or "one process",
                "seconds": seconds,
                "losses": found,
                "loss_difference": difference,
                "as_if_uninterrupted": difference <= TOLERANCES[self.dtype],
            }

    def close(self) -> None:
        self._prepare.kill()
        self._prepare.wait()

    def _train(self, run: Callable[..., Any], layout: str, folder: Path) -> tuple[list[dict[str, Any]], float]:
        """The lines of metrics.jsonl, and the seconds it took."""
        _, keys, world = parse(layout)
        began = time.monotonic()
        run(world, "resume_steps:train", str(self.recipe), [*keys, f"run.dir={folder}"])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return lines, round(time.monotonic() - began, 1)


def adopt(saved: Path, folder: Path) -> None:
    """Make a run that stands at another one's first checkpoint."""
    first, checkpoints = min((saved / "checkpoints").glob("step_*")), folder / "checkpoints"
    shutil.copytree(first, checkpoints / first.name, copy_function=os.link)
    (checkpoints / "latest").write_text(first.name + "\n")


def train(recipe: str, overrides: Sequence[str]) -> None:
    """One rank of a run, in a process of the pool."""
    from model_steps import free_tensors

    from megahybrid.config import load_config
    from megahybrid.training.loop import train as to_the_end

    to_the_end(load_config(recipe, overrides), report=lambda text: None)
    free_tensors()
