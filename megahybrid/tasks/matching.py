"""Whether a generated text holds the right answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


def share_found(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand anywhere in the text, upper and lower case alike: RULER's `string_match_all`
    (arXiv 2404.06654) of one sample. Control characters count as line ends, as there."""
    text = _UNPRINTABLE.sub("\n", text).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def begins_with(text: str, answer: str) -> bool:
    """Whether the first thing that the text says is this answer, letter by letter and no word longer. `share_found`
    counts whatever babbles for long enough; this does not."""
    text = text.lstrip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()
