"""Looking a name up in a phone book, in the manner of Jelassi et al. (arXiv 2402.01032, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from megahybrid.key import key
from megahybrid.tasks.draws import Draws
from megahybrid.tasks.haystack import lines_with
from megahybrid.tasks.task import TaskParameters, Vocabulary
from megahybrid.tasks.text import Draft, TextTask
from megahybrid.tasks.words import FIRST_NAMES, LAST_NAMES

_TOKENS_OF_AN_ENTRY = 4


@dataclass
class PhonebookParameters(TaskParameters):
    """Parameters of phonebook."""

    people: int | None = key(None)
    """Entries of the book; as many as the length has room for when left out."""
    examples: int = key(2, at_least=0)
    """Entries that are repeated between the book and the name that is asked, to show what is wanted."""


class Phonebook(TextTask):
    """Lines "First Last: 555-123-4567" of different people; some of them again, and then a name whose number is
    asked."""

    name = "phonebook"
    parameters = PhonebookParameters
    generated = 16
    has_depth = True

    def draft(
        self, parameters: PhonebookParameters, length: int, vocabulary: Vocabulary, draws: Draws, depth: float | None
    ) -> Draft:
        shown = 1 + parameters.examples
        everyone = len(FIRST_NAMES) * len(LAST_NAMES)
        count = min(parameters.people or shown + length // _TOKENS_OF_AN_ENTRY, everyone)
        names = [
            f"{FIRST_NAMES[each // len(LAST_NAMES)]} {LAST_NAMES[each % len(LAST_NAMES)]}"
            for each in draws.distinct(everyone, count).tolist()
        ]
        numbers = [_number(each) for each in draws.distinct(8 * 10**9, count).tolist()]
        lines = [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
        depths = draws.uniform(shown).tolist()
        if depth is not None:
            depths[0] = depth
        question = "\n".join([*lines[1:shown], f"{names[0]}:"])
        return Draft(
            lambda units: (
                "\n".join(lines_with(lines[shown : shown + units], lines[:shown], depths)) + f"\n\n{question}"
            ),
            numbers[:1],
            fewest=count - shown if parameters.people else 0,
            most=count - shown,
            facts={"haystack": "names"},
        )


def _number(number: int) -> str:
    digits = str(2 * 10**9 + number)
    return f"{digits[:3]}-{digits[3:6]}-{digits[6:]}"
