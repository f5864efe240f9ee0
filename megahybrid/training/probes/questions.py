"""Which tasks the probes ask."""

from __future__ import annotations

from typing import NamedTuple

from megahybrid.config.schema import Config
from megahybrid.config.task_sources import find_task, task_sources, task_stages
from megahybrid.errors import UserError
from megahybrid.tasks import Task, TaskParameters, Vocabulary

DEFAULT = "niah_single_1"
"""Where neither evaluate.tasks nor a source names one."""


class Question(NamedTuple):
    """A task with its parameters, at a length in tokens."""

    task: Task
    parameters: TaskParameters
    length: int

    @property
    def name(self) -> str:
        """In metrics."""
        return f"{self.task.name}_{self.length}"


def questions(config: Config, vocabulary: Vocabulary) -> list[Question]:
    """The tasks of evaluate.tasks or else of data.sources, with these sources' last parameters, at all lengths.

    Raises UserError for a task that cannot be made of these tokens at such a length; the one that nobody has asked for
    is then left out.
    """
    evaluate, found = config.evaluate, []
    trained = {source.task: task_stages(name, source)[-1].parameters for name, source in task_sources(config).items()}
    asked = evaluate.tasks or list(trained)
    for name in asked or [DEFAULT]:
        task = find_task(name, "evaluate.tasks")
        parameters = trained.get(name) or task.parameters()
        for length in evaluate.lengths or [parameters.length or config.train.seq_length]:
            try:
                task.check(parameters, length, vocabulary)
            except UserError:
                if asked:
                    raise
            else:
                found.append(Question(task, parameters, length))
    return found
