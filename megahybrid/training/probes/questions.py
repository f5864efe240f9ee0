"""Which tasks the probes ask."""

from __future__ import annotations

from typing import NamedTuple

from megahybrid.config.schema import Config
from megahybrid.errors import UserError
from megahybrid.tasks import TASKS, Task, TaskParameters, Vocabulary

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
    """Those of evaluate.tasks, at all of evaluate.lengths.

    Raises UserError for a task that cannot be made of these tokens at such a length; the one that nobody has asked for
    is then left out.
    """
    evaluate, found = config.evaluate, []
    for name in evaluate.tasks or [DEFAULT] * (DEFAULT in TASKS):
        task = TASKS[name]
        for length in evaluate.lengths or [config.train.seq_length]:
            parameters = task.parameters(length=length)
            try:
                task.check(parameters, length, vocabulary)
            except UserError:
                if evaluate.tasks:
                    raise
                continue
            found.append(Question(task, parameters, length))
    return found
