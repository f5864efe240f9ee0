"""Recall from text: as much of a haystack as a length has room for, and where the needles came to lie in its tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megahybrid.errors import UserError
from megahybrid.tasks.draws import Draws
from megahybrid.tasks.encoding import word_tokens
from megahybrid.tasks.task import Answer, Sample, Span, Task, TaskParameters, Vocabulary

# Tokens that names, words and numbers may take beyond those of one sample: at most 37 in a thousand of each task.
_MARGIN = 50


@dataclass(frozen=True)
class Draft:
    """A sample of any size.

    Attributes:
        prompt: its text with this many units of haystack, up to where the answers follow.
        answers: what is asked; each stands in the prompt as it is, and nothing else contains it.
        fewest, most: units that it can have.
        facts: of the sample.
    """

    prompt: Callable[[int], str]
    answers: Sequence[str]
    fewest: int
    most: int
    facts: dict[str, Any] = field(default_factory=dict)


class TextTask(Task):
    """A task whose samples are text, each answer after a space. A length holds the document token, the prompt and
    `generated` tokens more, as RULER counts; so a sample has fewer tokens than its length."""

    text = True

    @abstractmethod
    def draft(self, parameters: Any, length: int, vocabulary: Vocabulary, draws: Draws, depth: float | None) -> Draft:
        """The sample that the draws determine; `length` bounds what may have to be drawn."""

    def check(self, parameters: TaskParameters, length: int, vocabulary: Vocabulary) -> None:
        tokenizer = vocabulary.tokenizer
        if tokenizer is None:
            raise UserError(f"{self.name} is a task of text, and there is no tokenizer of text; set data.tokenizer.")
        draft = self.draft(parameters, length, vocabulary, Draws("check"), None)
        prompt = draft.prompt(draft.fewest)
        text = _with_answers(prompt, draft.answers)
        ids, asked = tokenizer.encode(text), tokenizer.encode(prompt)
        if tokenizer.decode(ids).strip() != text.strip() or ids[: len(asked)] != asked:
            line = text.splitlines()[-1][-60:]
            raise UserError(
                f"The tokenizer cannot write {self.name}: '{line}' comes back changed, or the answer begins in a token "
                "of the question; take a tokenizer that keeps every character and ends tokens before spaces."
            )
        needed = self._needed(draft, draft.fewest, vocabulary) + _MARGIN
        if needed > length:
            raise UserError(
                f"{self.name} needs {needed} tokens or more with this tokenizer, not {length}; raise its length."
            )

    def sample(
        self, parameters: Any, length: int, vocabulary: Vocabulary, draws: Draws, depth: float | None = None
    ) -> Sample:
        draft = self.draft(parameters, length, vocabulary, draws, depth)
        units = _most_units(lambda count: self._needed(draft, count, vocabulary), draft.fewest, draft.most, length)
        prompt = draft.prompt(units)
        ranges, end = [(len(prompt), len(prompt) + 1)], len(prompt)
        for answer in draft.answers:
            ranges.append((end + 1, end := end + 1 + len(answer)))
        places = [_places(prompt, answer) for answer in draft.answers]
        ids, spans = word_tokens(vocabulary.tokenizer).locate(
            _with_answers(prompt, draft.answers), ranges + [each for found in places for each in found]
        )
        spans = [Span(span.begin + 1, span.end + 1) for span in spans]
        needles = iter(spans[len(ranges) :])
        answers = tuple(
            Answer(span, tuple(next(needles) for _ in found), answer)
            for span, found, answer in zip(spans[1 : len(ranges)], places, draft.answers, strict=True)
        )
        tokens = np.array([vocabulary.document_id, *ids], np.int64)
        return Sample(tokens, min(spans[0].begin, answers[0].span.begin), answers, {**draft.facts, "units": units})

    def _needed(self, draft: Draft, units: int, vocabulary: Vocabulary) -> int:
        return 1 + word_tokens(vocabulary.tokenizer).count(draft.prompt(units)) + self.generated


def _with_answers(prompt: str, answers: Sequence[str]) -> str:
    return " ".join([prompt, *answers])


def _places(text: str, answer: str) -> list[tuple[int, int]]:
    """Where a text has an answer, by characters."""
    places, at = [], text.find(answer)
    while at >= 0:
        places.append((at, at + len(answer)))
        at = text.find(answer, at + len(answer))
    return places


def _most_units(needed: Callable[[int], int], fewest: int, most: int, length: int) -> int:
    """As many units as fit, or so many that what is left is less than one takes: a search that looks where a straight
    line through the two nearest counts says."""
    low, low_tokens = fewest, needed(fewest)
    high, high_tokens, guess = most + 1, None, min(fewest + 64, most)
    while high - low > 1:
        tokens = needed(guess)
        each = (tokens - low_tokens) / (guess - low)
        if tokens > length:
            high, high_tokens = guess, tokens
        else:
            low, low_tokens = guess, tokens
            if high_tokens is not None:
                each = (high_tokens - low_tokens) / (high - low)
        if length - low_tokens < each:
            break
        guess = min(max(low + int((length - low_tokens) / max(each, 1e-3)), low + 1), high - 1)
    return low
