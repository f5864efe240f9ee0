"""What a run can start from, and whether it can go on as it is asked to; nothing is built for it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megahybrid.config import Config, load_config
from megahybrid.config.branching import branch_point
from megahybrid.config.pattern import parse_pattern
from megahybrid.config.task_sources import find_task, task_parameters, task_sources, task_stages
from megahybrid.data.opened import OpenedData
from megahybrid.errors import UserError
from megahybrid.key import derived, keys, unusual
from megahybrid.retry import retry
from megahybrid.training import checkpoint_folder
from megahybrid.training.checkpoint_folder import NoCheckpoint
from megahybrid.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Start:
    """The checkpoint from which a run goes on.

    Attributes:
        checkpoint: None for a run's beginning with weights of its own, or of train.init_from.
        goes_back: whether that is a step back, by train.resume_from.
        branches: whether it is another run's, by train.branch_from, and this run begins.
    """

    checkpoint: Path | None = None
    goes_back: bool = False
    branches: bool = False

    @classmethod
    def of(cls, config: Config, back_to: int | None) -> Start:
        """Where the run stands, or would after going back to a step. Raises NoCheckpoint for a step, or a trunk, that
        is not there."""
        run = RunDirectory(config.run.dir)
        if back_to is not None:
            return cls(checkpoint_folder.find_step(run.checkpoints, back_to, "train.resume_from"), goes_back=True)
        if (found := checkpoint_folder.find(run.path)) is not None:
            return cls(found)
        if (point := branch_point(config.train)) is None:
            return cls()
        trunk, step = point
        if not trunk.is_dir():
            raise NoCheckpoint(f"train.branch_from: there is no run '{trunk}'; give the directory of a run.")
        found = checkpoint_folder.find_step(RunDirectory(trunk).checkpoints, step, "The step of train.branch_from")
        return cls(found, branches=True)

    def check(self, config: Config) -> None:
        """Raises UserError where a key differs from the checkpoint's that may not."""
        if self.checkpoint is not None:
            branch_data = config.train.branch_data if self.branches else None
            check_resume(load_config(self.checkpoint / "config.yaml"), config, str(self.checkpoint), branch_data)

    def reads_anew(self, config: Config) -> bool:
        """Whether it begins with the first sample of its data, whatever the checkpoint was trained on."""
        return self.branches and config.train.branch_data == "own"

    def check_data(self, config: Config, trained_on: str, data: OpenedData) -> None:
        """Raises UserError unless the data, in data.path or of the recipe's tasks, is what the checkpoint was trained
        on, whose identity that was, or, where the run reads anew, of the same tokenizer."""
        anew = self.reads_anew(config)
        if data.identity == trained_on and not anew:
            return
        holder = "the recipe's tasks make" if data.prepared is None else f"'{config.data.path}' holds"
        if not anew:
            instead = self._instead(data) if self.branches else ""
            raise UserError(f"'{self.checkpoint}' was trained on other data than {holder}; set it back{instead}.")
        if _tokenizer(self.checkpoint) != data.tokenizer_json:
            how = self._with_tokenizer(data)
            raise UserError(f"'{self.checkpoint}' was trained with another tokenizer than {holder}; {how}.")

    def _instead(self, data: OpenedData) -> str:
        """What else than its trunk's data a branch can have. A trunk's tokenizer that cannot be read is a fault only
        of a branch that reads anew."""
        own = ["set train.branch_data=own"]
        with contextlib.suppress(UserError):
            if _tokenizer(self.checkpoint) != data.tokenizer_json:
                own.insert(0, self._with_tokenizer(data))
        return f", or {' and '.join(own)}"

    def _with_tokenizer(self, data: OpenedData) -> str:
        """How the data gets the checkpoint's tokenizer."""
        how = "set" if data.prepared is None else "prepare with"
        return f"{how} data.tokenizer='{self.checkpoint / checkpoint_folder.TOKENIZER}'"


def _tokenizer(checkpoint: Path) -> str:
    """The text of its tokenizer.json, to the byte. Raises UserError where there is none that can be read."""
    file = checkpoint / checkpoint_folder.TOKENIZER
    try:
        return retry(file.read_bytes, f"Reading '{file}'").decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' is missing or not readable; put it back, or branch from another step.") from error


def check_resume(saved: Config, now: Config, checkpoint: str, branch_data: str | None = None) -> None:
    """Raises UserError for the first key that means something else and may not: those without `may_change=True`
    where they are defined, in config/schema.py or by a mixer or task; of a branch, whose train.branch_data that is,
    not those of data of its own."""
    instead = "train in another run.dir" if branch_data is None else "start with train.init_from"
    before, after = (meaning(config) for config in (saved, now))
    written = [{name: value for name, value, _ in keys(derived(config))} for config in (saved, now)]
    for values, meant in zip(written, (before, after), strict=True):  # a weight is its part of all
        values |= {name: f"{float(part):.4g} of all" for name, part in meant.items() if isinstance(part, Fraction)}
    # What one has alone first: a source that came or went changes the others' parts.
    for name in sorted(before.keys() | after.keys(), key=lambda name: (name in before and name in after, name)):
        of_data = name.startswith("data.")
        if before.get(name) != after.get(name) and not (of_data and branch_data == "own"):
            hint = "; other data takes train.branch_data=own" if of_data and branch_data else ""
            raise UserError(
                f"'{checkpoint}' was trained with {name} = {written[0].get(name)}, not {written[1].get(name)}; "
                f"set it back, or {instead}{hint}."
            )


def meaning(config: Config) -> dict[str, Any]:
    """What the keys that may not change mean, by name: equal where configurations differ in their spelling only.

    Keys are left out whose value is the one that holds without them, a source's weight is its part of all weights, and
    `|` in the pattern is no part of the model.
    """
    found = _fixed(config)
    found["model.pattern"] = parse_pattern(config.model.pattern).letters
    weights = {name: Fraction(source.weight) for name, source in config.data.sources.items() if source.weight}
    for name, weight in weights.items():
        found[f"data.sources.{name}.weight"] = weight / sum(weights.values())
    for name, source in task_sources(config).items():
        where, task = f"data.sources.{name}", find_task(str(source.task), f"data.sources.{name}.task")
        found[f"{where}.parameters"] = _fixed(task_parameters(task, source.parameters, f"{where}.parameters"))
        found[f"{where}.stages"] = [(stage.until, _fixed(stage.parameters)) for stage in task_stages(name, source)]
    return found


def _fixed(section: Any) -> dict[str, Any]:
    """Its keys that may not change, by name, without those whose value is the one that holds without them."""
    return {name: value for name, value, rules in unusual(section) if not rules.may_change}


def initial_weights(config: Config) -> Path | None:
    """The checkpoint that train.init_from means, None where it is left out. Raises UserError where there is none."""
    if config.train.init_from is None:
        return None
    found = checkpoint_folder.find(Path(config.train.init_from))
    if found is None:
        path = config.train.init_from
        exported = (Path(path) / "config.json").is_file()
        hint = (
            f"; make one of the model there with `megahybrid import {path} TARGET`, and give TARGET" if exported else ""
        )
        raise UserError(f"train.init_from: there is no checkpoint in '{path}'{hint}.")
    return found
