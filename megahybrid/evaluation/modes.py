"""The two ways of asking a model: its answers beside the right ones in one pass, or as it writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megahybrid.config import Config
from megahybrid.config.pattern import parse_pattern
from megahybrid.errors import UserError
from megahybrid.evaluation.forced import Reading, read
from megahybrid.evaluation.generated import answers_one_by_one, continuations
from megahybrid.evaluation.subject import Subject
from megahybrid.mixers import KINDS
from megahybrid.mixers.kind import LEARNED
from megahybrid.tasks import Sample, Task
from megahybrid.tasks.matching import begins_with, share_found

_MOST_SHOWN = 64  # tokens of an answer that a line shows


class Outcome(NamedTuple):
    """What a model made of a sample, each with an entry an answer (but text, where it writes one for all).

    Attributes:
        right: 1 or 0; of a generated text, whether it contains the answer.
        first: 1 or 0, whether the first answer is what it says first.
        nll: of the right answer, nats a token; None where the model was not asked.
        kept: share of the heads of layers with keys whose state holds a needle at the query; None likewise.
        text: what it answers.
    """

    right: list[int]
    first: int
    nll: list[float | None]
    kept: list[float | None]
    text: list[str]


def check(config: Config, policies: Sequence[str]) -> None:
    """Raise UserError for a policy that no layer of the recipe's model has."""
    pattern = config.model.pattern
    kinds = [KINDS[letter] for letter in dict.fromkeys(parse_pattern(pattern).letters)]
    known = list(dict.fromkeys([LEARNED, *(policy for kind in kinds for policy in kind.policies)]))
    for policy in policies:
        if policy not in known:
            raise UserError(f"--policy is '{policy}'; choose among {', '.join(known)}: the pattern is {pattern}.")


def forced(subject: Subject, task: Task, samples: Sequence[Sample], prefill_chunk: int) -> list[Outcome]:
    """Whether every token of an answer is the likeliest one after the right ones before it."""
    readings = read(subject.model, samples, subject.answers(task).size, prefill_chunk)
    return [_outcome(subject, sample, reading) for sample, reading in zip(samples, readings, strict=True)]


def _outcome(subject: Subject, sample: Sample, reading: Reading) -> Outcome:
    places = [slice(*answer.span) for answer in sample.answers]
    right = [int((reading.found[place] == sample.tokens[place]).all()) for place in places]
    return Outcome(
        right,
        right[0],
        [round(float(reading.nll[place].mean()), 3) for place in places],
        [None if np.isnan(share) else round(float(share), 4) for share in reading.kept],
        [_shown(subject, reading.found[place].tolist()) for place in places],
    )


def generate(subject: Subject, task: Task, samples: Sequence[Sample], prefill_chunk: int) -> list[Outcome]:
    """What the model writes, greedily: of text behind the prompt, of bare tokens in the place of each answer."""
    vocabulary = subject.answers(task)
    if task.text:
        prompts = [sample.tokens[: sample.prompt].tolist() for sample in samples]
        most = task.generated or max(len(sample.tokens) - sample.prompt for sample in samples)
        written = continuations(subject.model, prompts, most, vocabulary, prefill_chunk)
        return [
            _said(sample, subject.tokenizer.decode(tokens)) for sample, tokens in zip(samples, written, strict=True)
        ]
    found = answers_one_by_one(subject.model, samples, vocabulary, prefill_chunk)
    return [_written(subject, sample, answers) for sample, answers in zip(samples, found, strict=True)]


def _said(sample: Sample, text: str) -> Outcome:
    answers = [answer.text for answer in sample.answers]
    nothing = [None] * len(answers)
    right = [int(share_found(text, [answer])) for answer in answers]
    return Outcome(right, int(begins_with(text, answers[0])), nothing, nothing, [text])


def _written(subject: Subject, sample: Sample, answers: Sequence[Sequence[int]]) -> Outcome:
    nothing = [None] * len(answers)
    asked = [sample.tokens[slice(*answer.span)].tolist() for answer in sample.answers]
    right = [int(wanted == each) for wanted, each in zip(asked, answers, strict=True)]
    return Outcome(right, right[0], nothing, nothing, [_shown(subject, each) for each in answers])


MODES = {"forced": forced, "generate": generate}
"""By the name of `--mode`."""


def _shown(subject: Subject, tokens: Sequence[int]) -> str:
    return subject.tokenizer.decode(tokens[:_MOST_SHOWN]).strip()
