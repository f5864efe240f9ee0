"""Rows of a task's samples: made when they are read, the same wherever and whenever that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megahybrid.config.schema import Config
from megahybrid.config.task_sources import Stage, check_stages, find_task, task_sources, task_stages
from megahybrid.data.ahead import Ahead
from megahybrid.data.order import ENDLESS
from megahybrid.errors import UserError
from megahybrid.tasks import Task, Vocabulary
from megahybrid.tasks.draws import Draws

_Sources = list[tuple[str, Task, list[Stage]]]


class TaskRows:
    """The rows of all task sources in use, sorted by name: `rows[i]` → columns, as `ShardReader`.

    Row r of source number n has the index ENDLESS (n + 1) + r. It holds as many samples as fit, the one at place p
    drawn from (train.seed, source, r, p), and document tokens where none fits.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary):
        """Raises UserError for a task that cannot make its samples in this vocabulary."""
        check_stages(config, vocabulary)
        used = {name: source for name, source in task_sources(config).items() if source.weight}
        self.weights = {name: float(source.weight or 0) for name, source in used.items()}
        """Source → its part of all rows, relative to those of other sources."""
        sources = [
            (name, find_task(str(source.task), name), task_stages(name, source)) for name, source in used.items()
        ]
        self._make = _Maker(sources, vocabulary, config.train.seed, config.train.seq_length, _identities(sources))
        self._process = Ahead(self._make, "makes rows of tasks")
        self._ahead: dict[int, dict[str, NDArray]] = {}

    def __getitem__(self, index: int) -> dict[str, NDArray]:
        """`tokens` int64 `[L + 1]`, `borders` int32, where a sample begins, 0 first, and `weights` fp32 `[L]`, of the
        labels tokens[1:]; L is the seq_length."""
        self._ahead = self._process.fetch() or self._ahead
        return self._ahead.get(index) or self._make.row(index)

    def look_ahead(self, indices: Sequence[int]) -> None:
        """Have these rows made by a process beside this one. Raises MachineFault if it died, as reading them does."""
        if indices:
            self._process.ask(list(indices))

    def close(self) -> None:
        """End the process."""
        self._process.close()


def _identities(sources: _Sources) -> list[list[dict[str, Any]]]:
    return [[task.identity(stage.parameters) for stage in stages] for _, task, stages in sources]


@dataclass(frozen=True)
class _Maker:
    """What rows are made of: each source's name, task and stages; seed and seq_length; and what the tasks were when the
    run began, which may read files that another process finds changed."""

    sources: _Sources
    vocabulary: Vocabulary
    seed: int
    length: int
    identities: list[list[dict[str, Any]]]

    def __call__(self, indices: Sequence[int]) -> dict[int, dict[str, NDArray]]:
        """Raises UserError if the tasks are not what they were."""
        if _identities(self.sources) != self.identities:
            raise UserError("A haystack of data.sources is another one than when the run began; start the run again.")
        return {index: self.row(index) for index in indices}

    def row(self, index: int) -> dict[str, NDArray]:
        """See `TaskRows.__getitem__`."""
        number, row = divmod(index, ENDLESS)
        name, task, stages = self.sources[number - 1]
        parameters = next(stage.parameters for stage in stages if stage.until is None or row < stage.until)
        length = parameters.length or self.length
        tokens = np.full(self.length + 1, self.vocabulary.document_id, np.int64)
        weights = np.zeros(self.length + 1, np.float32)
        borders, at = [0], 0
        while fitting := (self.length - at) // length:
            places = range(len(borders) - 1, len(borders) - 1 + fitting)
            draws = [Draws("train", self.seed, name, row, place) for place in places]
            for sample in task.samples(parameters, length, self.vocabulary, draws):
                end = at + len(sample.tokens)
                tokens[at:end], weights[at:end] = sample.tokens, sample.weights(parameters)
                borders.append(end)
                at = end
        return {
            "tokens": tokens,
            "borders": np.array(borders if at < self.length else borders[:-1], np.int32),
            "weights": weights[1:],
        }
