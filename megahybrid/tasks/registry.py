"""The list of all tasks."""

from __future__ import annotations

from megahybrid.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in ()}
"""Every task by its name."""
