"""Probes on recall tasks: answers whose needles are inside the window and beyond it, and whether heads hold these."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megahybrid.config.evaluation import evaluation_window
from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import Config
from megahybrid.model.context import Watch
from megahybrid.parallel import groups
from megahybrid.tasks import Sample, Vocabulary
from megahybrid.tasks.draws import Draws
from megahybrid.training.engine import Engine
from megahybrid.training.probes import names
from megahybrid.training.probes.questions import Question
from megahybrid.training.probes.rows import Found, Row, filled, means, passed, rounded


class _Asked(NamedTuple):
    """The answers of one row, each token of theirs and each token of their needles in turn.

    Attributes:
        places: int64 `[tokens]`, from where each token is predicted.
        answers: int64 `[tokens]`, whose it is, numbered over all samples of all replicas.
        pairs: the query of the first token of an answer, beside each token of one of its needles.
        needles: int64 `[pairs]`, which needle of the row that is.
        askers: int64 `[needles]`, the answer to which each needle belongs.
    """

    places: Tensor
    answers: Tensor
    pairs: Watch
    needles: Tensor
    askers: Tensor


class RecallProbes:
    """recall and kept, as far as asked for; the samples are shared among replicas."""

    def __init__(self, config: Config, questions: Sequence[Question], vocabulary: Vocabulary):
        self._probes, self._layers = config.evaluate.probes, len(parse_pattern(config.model.pattern).letters)
        self._questions, self._sizes, samples = questions, [], []
        for question in questions:
            some = fixed_samples(question, vocabulary, config.evaluate.samples)
            self._sizes.append(sum(len(sample.answers) for sample in some))
            samples += some
        answers = [answer for sample in samples for answer in sample.answers]
        self._distances, self._window = np.array([answer.distance for answer in answers]), evaluation_window(config)
        self._tokens = np.array([answer.span.end - answer.span.begin for answer in answers])
        firsts = [0, *accumulate(len(sample.answers) for sample in samples)]
        replica, replicas = groups.data_parallel()
        mine, firsts = samples[replica::replicas], firsts[replica::replicas]
        documents = [torch.from_numpy(np.stack([sample.tokens[:-1], sample.tokens[1:]])) for sample in mine]
        self._rows, self._asked = [], []
        for numbers, batch in filled(documents, config.train):
            begins = batch.sequences.borders
            asked = _asked([(mine[n], firsts[n], begin) for n, begin in zip(numbers, begins, strict=False)])
            watch = asked.pairs if "kept" in self._probes else None
            self._rows.append(Row(batch, asked.places, watch))
            self._asked.append(asked)

    def run(self, engine: Engine) -> dict[str, Any]:
        """Metrics; the same on all processes."""
        # Of each answer: nats, wrong tokens, and by layer how many heads hold it, of how many.
        table = torch.zeros(len(self._tokens), 2 + 2 * self._layers, dtype=torch.float64)
        for row, asked, found in zip(self._rows, self._asked, passed(engine, self._rows), strict=True):
            _count(table, row, asked, found, self._layers)
        whole = groups.sum_over_all(table.to(engine.device)).cpu().numpy()
        metrics: dict[str, Any] = {}
        begin = 0
        for question, size in zip(self._questions, self._sizes, strict=True):
            rows = slice(begin, begin + size)
            metrics |= self._metrics(question.name, whole[rows], self._distances[rows], self._tokens[rows])
            begin += size
        return metrics

    def _metrics(
        self, name: str, table: NDArray[np.float64], distances: NDArray[np.float64], tokens: NDArray[np.int64]
    ) -> dict[str, Any]:
        inside, beyond = distances <= self._window, distances > self._window
        right, metrics = table[:, 1] == 0, {}
        if "recall" in self._probes:
            metrics[names.ACCURACY + name] = [share(right[inside]), share(right[beyond])]
            sums = [(table[some, 0].sum(), tokens[some].sum()) for some in (inside, beyond)]
            metrics[names.NLL + name] = means(*np.array(sums).T)
            metrics[names.NULL + name] = share(inside)
        held, heads = np.split(table[beyond, 2:], 2, axis=1)
        if "kept" in self._probes and heads.any():
            layers, somewhere = means(held.sum(0), heads.sum(0)), held.any(1)
            metrics |= {names.KEPT + name: rounded(held.sum() / heads.sum()), names.BY_LAYER + name: layers}
            metrics[names.SOMEWHERE + name] = share(somewhere)
            metrics[names.GIVEN + name] = [share(right[beyond][some]) for some in (~somewhere, somewhere)]
        return metrics


def share(flags: NDArray[np.bool_]) -> float | None:
    """Of those that are true; None where there are none at all."""
    return rounded(flags.mean()) if len(flags) else None


def fixed_samples(question: Question, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """The same ones in every run, their needles evenly spread over the context."""
    samples, (_, task, parameters, length) = [], question
    for number in range(count):
        depth = number / max(1, count - 1)
        draws = Draws("evaluate", task.name, length, depth, number)
        samples.append(task.sample(parameters, length, vocabulary, draws, depth))
    return samples


def _asked(samples: Sequence[tuple[Sample, int, int]]) -> _Asked:
    """Of samples, each with the number of its first answer and where it begins in the row."""
    lists: dict[str, list[int]] = {name: [] for name in ("places", "answers", "queries", "keys", "needles", "askers")}
    for sample, first, begin in samples:
        for number, answer in enumerate(sample.answers, start=first):
            tokens = range(begin + answer.span.begin - 1, begin + answer.span.end - 1)
            lists["places"] += tokens
            lists["answers"] += [number] * len(tokens)
            for needle in answer.needles:
                size = needle.end - needle.begin
                lists["queries"] += [tokens[0]] * size
                lists["keys"] += range(begin + needle.begin, begin + needle.end)
                lists["needles"] += [len(lists["askers"])] * size
                lists["askers"].append(number)
    places, answers, queries, keys, needles, askers = (
        torch.tensor(numbers, dtype=torch.int64) for numbers in lists.values()
    )
    return _Asked(places, answers, Watch(queries, keys), needles, askers)


def _count(table: Tensor, row: Row, asked: _Asked, found: Found, layers: int) -> None:
    """Add what this process knows of a row's answers to the table of all."""
    if found.losses is not None:
        wrong = found.likeliest != row.batch.labels[asked.places]
        table[:, 0].index_add_(0, asked.answers, found.losses[asked.places])
        table[:, 1].index_add_(0, asked.answers, wrong.double())
    for layer, seen in found.seen.items():
        missing = torch.zeros(len(asked.askers), seen.shape[1]).index_add_(0, asked.needles, (~seen).float())
        holding = torch.zeros(len(table), seen.shape[1]).index_add_(0, asked.askers, (missing == 0).float()) > 0
        table[:, 2 + layer] += holding.sum(1)
        table[asked.askers, 2 + layers + layer] += seen.shape[1]
