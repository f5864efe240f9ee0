"""Recall tasks: samples whose answers stand somewhere in their context. No module of it imports torch."""

from __future__ import annotations

from megahybrid.tasks.registry import TASKS
from megahybrid.tasks.task import Answer, Sample, Span, Task, TaskParameters, Vocabulary

__all__ = ["TASKS", "Answer", "Sample", "Span", "Task", "TaskParameters", "Vocabulary"]
