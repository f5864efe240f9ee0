"""RULER's tasks of recall (Hsieh et al., arXiv 2404.06654; NVIDIA/RULER): its templates to the letter.

Two things are not RULER's: keys are pairs of words of our own lists, and sentences end where `haystack.Prose` says, as
RULER takes both from packages (wonderwords, nltk). Where several answers are right, they follow each other with spaces
between them, as in RULER's own example of variable tracking.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megahybrid.errors import UserError
from megahybrid.key import key
from megahybrid.tasks.draws import Draws
from megahybrid.tasks.haystack import NOISE, Prose, lines_with, prose
from megahybrid.tasks.task import TaskParameters, Vocabulary
from megahybrid.tasks.text import Draft, TextTask
from megahybrid.tasks.words import ADJECTIVES, NOUNS

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text? The "
    "special magic {kind} for {query} mentioned in the provided text is"
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)

# In percent: 40 of them, evenly spaced, rounded.
_DEPTHS = [round(100 * step / 39) for step in range(40)]
# No needle is shorter: it has this many words.
_WORDS_OF_A_NEEDLE = len(NEEDLE.split())


@dataclass
class ProseParameters(TaskParameters):
    """Parameters of tasks whose haystack is prose."""

    haystack: str | None = key(None, may_change=True)
    """File of text, or folder of *.txt, that needles are hidden in. RULER's are Paul Graham's essays."""
    shift: bool = key(False)
    """Begin the haystack at a sentence drawn for each sample, as training should, and not at its first, as RULER."""


def _words(draws: Draws, count: int) -> list[str]:
    return [
        f"{ADJECTIVES[each // len(NOUNS)]}-{NOUNS[each % len(NOUNS)]}"
        for each in draws.distinct(len(ADJECTIVES) * len(NOUNS), count).tolist()
    ]


def _numbers(draws: Draws, count: int) -> list[str]:
    return [str(10**6 + each) for each in draws.distinct(9 * 10**6, count).tolist()]


def _uuids(draws: Draws, count: int) -> list[str]:
    bits = draws.below(1 << 32, 4 * count).reshape(count, 4).tolist()
    return [str(uuid.UUID(int=a << 96 | b << 64 | c << 32 | d, version=4)) for a, b, c, d in bits]


_DRAWN: dict[str, Callable[[Draws, int], list[str]]] = {"words": _words, "numbers": _numbers, "uuids": _uuids}


class NeedleInAHaystack(TextTask):
    """RULER's niah tasks."""

    generated = 128

    def __init__(
        self, name: str, haystack: str, keys: str, values: str, num_keys: int = 1, num_values: int = 1, queries: int = 1
    ):
        """
        Args:
            name: of the task.
            haystack: "noise", "prose", or "needles", which are needles with other keys.
            keys, values: what they are: "words", "numbers" or "uuids".
            num_keys: different keys that the context has values for, those of a haystack of needles apart.
            num_values: of each key.
            queries: keys that are asked.
        """
        self.name = name
        self.parameters = ProseParameters if haystack == "prose" else TaskParameters
        self._haystack, self._keys, self._values = haystack, keys, values
        self._num_keys, self._num_values, self._queries = num_keys, num_values, queries
        self.has_depth = num_values * queries == 1

    def draft(
        self, parameters: TaskParameters, length: int, vocabulary: Vocabulary, draws: Draws, depth: float | None
    ) -> Draft:
        count, others = self._num_keys * self._num_values, 0
        if self._haystack == "needles":
            others = length // _WORDS_OF_A_NEEDLE
            if self._keys == "words":
                others = min(others, len(ADJECTIVES) * len(NOUNS) - self._num_keys)
        keys = _DRAWN[self._keys](draws, self._num_keys + others)
        values = _DRAWN[self._values](draws, count + others)
        owners = [each for each in range(self._num_keys) for _ in range(self._num_values)]
        owners += range(self._num_keys, len(keys))
        needles = [
            NEEDLE.format(kind=self._values, key=keys[owner], value=value)
            for owner, value in zip(owners, values, strict=True)
        ]
        depths = self._depths(draws, count)
        if depth is not None and self.has_depth:
            depths[0] = depth
        context, facts = self._context(parameters, draws, needles[:count], depths, needles[count:])
        kind, template = (self._values[:-1], ONE) if self.has_depth else (self._values, SEVERAL)
        *before, last = keys[: self._queries]
        query = f"{', '.join(before)}, and {last}" if before else last
        return Draft(
            lambda units: template.format(kind=kind, context=context(units), query=query),
            values[: self._queries * self._num_values],
            fewest=count,
            most=others if self._haystack == "needles" else length,
            facts=facts,
        )

    def identity(self, parameters: TaskParameters) -> dict[str, Any]:
        if not isinstance(parameters, ProseParameters):
            return super().identity(parameters)
        return {**super().identity(parameters), "haystack": self._prose(parameters).digest}

    def _depths(self, draws: Draws, count: int) -> list[float]:
        if self._haystack == "prose":
            return [_DEPTHS[each] / 100 for each in draws.distinct(len(_DEPTHS), count)]
        return draws.uniform(count).tolist()

    def _context(
        self, parameters: TaskParameters, draws: Draws, needles: list[str], depths: list[float], others: list[str]
    ) -> tuple[Callable[[int], str], dict[str, str]]:
        """The text around the needles by its units, and what is to be said of it."""
        if isinstance(parameters, ProseParameters):
            text = self._prose(parameters)
            begin = text.sentence_after(int(draws.below(len(text), 1)[0])) if parameters.shift else 0
            facts = {"haystack": text.name, "haystack_hash": text.digest}
            return lambda units: text.between(begin, units, needles, depths), facts
        if self._haystack == "noise":
            return lambda units: "\n".join(lines_with([NOISE] * units, needles, depths)), {"haystack": "noise"}
        return lambda units: "\n".join(lines_with(others[:units], needles, depths)), {"haystack": "needles"}

    def _prose(self, parameters: ProseParameters) -> Prose:
        if parameters.haystack is None:
            raise UserError(
                f"{self.name} hides its needles in prose; set its parameter haystack to a file of text, or a folder of "
                "*.txt."
            )
        return prose(parameters.haystack)


NEEDLES = (
    NeedleInAHaystack("niah_single_1", "noise", "words", "numbers"),
    NeedleInAHaystack("niah_single_2", "prose", "words", "numbers"),
    NeedleInAHaystack("niah_single_3", "prose", "words", "uuids"),
    NeedleInAHaystack("niah_multikey_1", "prose", "words", "numbers", num_keys=4),
    NeedleInAHaystack("niah_multikey_2", "needles", "words", "numbers"),
    NeedleInAHaystack("niah_multikey_3", "needles", "uuids", "uuids"),
    NeedleInAHaystack("niah_multivalue", "prose", "words", "numbers", num_values=4),
    NeedleInAHaystack("niah_multiquery", "prose", "words", "numbers", num_keys=4, queries=4),
)
