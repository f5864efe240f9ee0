"""Which tasks an evaluation asks, and with what parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megahybrid.config import Config
from megahybrid.config.task_sources import asked_sources, named_task, task_parameters
from megahybrid.errors import UserError
from megahybrid.tasks import TASKS, Sample, Task, TaskParameters, Vocabulary
from megahybrid.tasks.draws import Draws

_OF_TRAINING = [field.name for field in dataclasses.fields(TaskParameters)]
"""Parameters that evaluation has no use for: it is told lengths otherwise, and knows no loss."""


@dataclass(frozen=True)
class Chosen:
    """A task with its parameters.

    Attributes:
        name: in results: the source's of the recipe, or the task's own.
    """

    name: str
    task: Task
    parameters: TaskParameters

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its samples, beside the vocabulary."""
        settings = self.task.identity(self.parameters)
        return {name: value for name, value in settings.items() if name not in _OF_TRAINING}

    def sample(self, length: int, vocabulary: Vocabulary, depth: float | None, index: int) -> Sample:
        """The sample of this number: for every model with this vocabulary the same."""
        draws = Draws("evaluate", self.task.name, length, depth, index)
        return self.task.sample(self.parameters, length, vocabulary, draws, depth)


def choose(config: Config, names: Sequence[str], changes: Sequence[str]) -> tuple[Chosen, ...]:
    """The tasks of these names, or all task sources of a recipe where there are none.

    Args:
        names: a source's or a task's, see `named_task`.
        changes: KEY=VALUE, for all tasks that have such a parameter.

    Raises UserError for names that are neither, for a recipe without tasks, and for a change that fits no task.
    """
    sources, values = asked_sources(config), dict(map(_change, changes))
    if not (names or sources):
        raise UserError(f"The recipe has no tasks in data.sources; name some with --task: {', '.join(sorted(TASKS))}.")
    chosen = tuple(_chosen(config, name, values) for name in dict.fromkeys(names or sources))
    for name in values:
        if name in _OF_TRAINING:
            raise UserError(f"--set {name} is for training; leave it out{' and give --lengths' * (name == 'length')}.")
        if not any(hasattr(each.parameters, name) for each in chosen):
            fields = {field.name for each in chosen for field in dataclasses.fields(each.parameters)}
            known = sorted(fields - {*_OF_TRAINING})
            raise UserError(f"--set {name} is no parameter of the tasks; they have {', '.join(known) or 'none'}.")
    return chosen


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UserError(f"--set has '{text}'; write KEY=VALUE, such as pairs=96.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not valid YAML; put it in quotes.") from error


def _chosen(config: Config, name: str, changes: Mapping[str, Any]) -> Chosen:
    task, values = named_task(config, name, "--task")
    known = {field.name for field in dataclasses.fields(task.parameters)}
    own = {key: value for key, value in changes.items() if key in known}
    return Chosen(name, task, task_parameters(task, {**values, **own}, f"--set, {name}"))
