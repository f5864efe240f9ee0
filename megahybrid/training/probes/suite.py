"""All probes of a run."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from megahybrid.config.evaluation import evaluation_window
from megahybrid.config.schema import Config
from megahybrid.data.loader import validation_batches
from megahybrid.parallel import groups
from megahybrid.tasks import Vocabulary
from megahybrid.training.engine import Engine
from megahybrid.training.probes import names
from megahybrid.training.probes.questions import questions
from megahybrid.training.probes.recall import RecallProbes
from megahybrid.training.probes.rows import rounded
from megahybrid.training.probes.text import TextProbes


class Probes:
    """Those of evaluate.probes, always on the same samples; their batches are made once, here."""

    def __init__(self, config: Config, vocabulary: Vocabulary):
        """A collective of all processes. Raises UserError for a task that this model cannot be asked."""
        self._config = config
        asked, train = set(config.evaluate.probes), replace(config.train, validation_samples=config.evaluate.samples)
        self._probes: list[TextProbes | RecallProbes] = []
        if asked & {"position", "gain", "hits"}:
            with validation_batches(replace(config, train=train), *groups.data_parallel()) as batches:
                if batches.samples:
                    self._probes.append(TextProbes(config, list(batches)))
        self._questions = questions(config, vocabulary) if asked & {"recall", "kept"} else []
        if self._questions:
            self._probes.append(RecallProbes(config, self._questions, vocabulary))

    def __str__(self) -> str:
        """In a line."""
        evaluate, tasks = self._config.evaluate, ", ".join(question.name for question in self._questions)
        return (
            f"Probes every {evaluate.every} steps on {evaluate.samples} samples, window "
            f"{evaluation_window(self._config)}: {', '.join(evaluate.probes)}" + (f"; tasks {tasks}." if tasks else ".")
        )

    def run(self, engine: Engine) -> dict[str, Any]:
        """Metrics, and the seconds that they took; a collective of all processes, on which the metrics are the same."""
        began, metrics = time.perf_counter(), {}
        for probe in self._probes:
            metrics |= probe.run(engine)
        if "kept" in self._config.evaluate.probes:
            metrics |= self._dead(engine)
        return metrics | {names.SECONDS: rounded(time.perf_counter() - began)}

    def _dead(self, engine: Engine) -> dict[str, int]:
        """How many members of regulated layers do nothing, after the last step."""
        dead: dict[str, int] = {}
        for regulator in engine.regulators.values():
            values, key = regulator.metrics(), f"{names.DEAD}{regulator.member}s"
            for quantity in regulator.quantities(self._config):
                if quantity.dead is not None:
                    dead[key] = dead.get(key, 0) + int((values[quantity.key] < quantity.dead).sum())
        return dead
