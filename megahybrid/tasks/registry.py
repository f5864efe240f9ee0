"""The list of all tasks."""

from __future__ import annotations

from megahybrid.tasks.bare import MQAR, Copy, SelectiveMQAR
from megahybrid.tasks.phonebook import Phonebook
from megahybrid.tasks.ruler import NEEDLES
from megahybrid.tasks.task import Task
from megahybrid.tasks.tracking import VariableTracking

TASKS: dict[str, Task] = {
    task.name: task for task in (MQAR(), SelectiveMQAR(), Copy(), *NEEDLES, VariableTracking(), Phonebook())
}
"""Every task by its name."""
