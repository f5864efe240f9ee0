"""The list of all tasks."""

from __future__ import annotations

from megahybrid.tasks.bare import MQAR, Copy, SelectiveMQAR
from megahybrid.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (MQAR(), SelectiveMQAR(), Copy())}
"""Every task by its name."""
