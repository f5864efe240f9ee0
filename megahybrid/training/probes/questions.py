"""Which tasks the probes ask."""

from __future__ import annotations

from typing import NamedTuple

from megahybrid.config.schema import Config
from megahybrid.config.task_sources import asked_sources, named_task, task_parameters
from megahybrid.errors import UserError
from megahybrid.tasks import Task, TaskParameters, Vocabulary

DEFAULT = "niah_single_1"
"""Where neither evaluate.tasks nor a source names one."""


class Question(NamedTuple):
    """A task with its parameters, at a length in tokens; asked for by the name of a source or its own."""

    asked: str
    task: Task
    parameters: TaskParameters
    length: int

    @property
    def name(self) -> str:
        """In metrics."""
        return f"{self.asked}_{self.length}"


def questions(config: Config, vocabulary: Vocabulary) -> list[Question]:
    """The tasks of evaluate.tasks or else of data.sources, as `named_task` finds them, at all lengths.

    Raises UserError for a task that cannot be made of these tokens at such a length; the one that nobody has asked for
    is then left out.
    """
    evaluate, found = config.evaluate, []
    asked = evaluate.tasks or asked_sources(config)
    for name in asked or [DEFAULT]:
        task, values = named_task(config, name, "evaluate.tasks")
        parameters = task_parameters(task, values, f"evaluate.tasks, {name}")
        for length in evaluate.lengths or [parameters.length or config.train.seq_length]:
            try:
                task.check(parameters, length, vocabulary)
            except UserError:
                if asked:
                    raise
            else:
                found.append(Question(name, task, parameters, length))
    return found
