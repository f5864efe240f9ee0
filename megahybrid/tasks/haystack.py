"""The texts that needles are hidden in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from megahybrid.errors import UserError

# RULER's `niah.py` and `variable_tracking.py`.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_END_OF_SENTENCE = re.compile(r"[.!?][\"'”’»)\]]*$")


class Prose:
    """Words of one or more files of text, over and over.

    Attributes:
        name: of the file or folder.
        digest: the first 12 digits of sha256 of its words, joined by spaces.
    """

    def __init__(self, name: str, text: str):
        self.name = name
        self._words = text.split()
        self.digest = hashlib.sha256(" ".join(self._words).encode()).hexdigest()[:12]
        self._ends = np.array([bool(_END_OF_SENTENCE.search(word)) for word in self._words])

    def __len__(self) -> int:
        return len(self._words)

    def sentence_after(self, place: int) -> int:
        """The word that begins the sentence after the one that the word at a place is in, or 0."""
        ends = np.flatnonzero(self._ends[place:])
        return (place + int(ends[0]) + 1) % len(self) if len(ends) else 0

    def between(self, begin: int, count: int, needles: Sequence[str], depths: Sequence[float]) -> str:
        """`count` words from the one at `begin` on, with needles between sentences.

        A sentence ends at a word that ends with a full stop, a question or an exclamation mark. A needle of depth d in
        [0, 1] has the share d of the sentences before it, as in RULER, whose spaces these are, too: two where a
        needle is the first, or the last, or follows another.
        """
        whole, rest = divmod(begin + count, len(self))
        words = (self._words * whole + self._words[:rest])[begin:]
        ends = self._ends[np.arange(begin, begin + count) % len(self)]
        ends[-1:] = True
        begins = [0, *(np.flatnonzero(ends) + 1).tolist()]
        pieces, done = [], 0
        for depth, needle in sorted(zip(depths, needles, strict=True)):
            place = begins[int((len(begins) - 1) * depth)]
            pieces += [" ".join(words[done:place]), needle]
            done = place
        return " ".join([*pieces, " ".join(words[done:])])


def lines_with(lines: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Lines with needles among them, each with its depth's share of the lines, from 0 to 1, before it."""
    found = list(lines)
    for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
        found.insert(int(len(lines) * depth), needle)
    return found


@lru_cache(maxsize=8)
def prose(path: str) -> Prose:
    """That of a file, or of all `*.txt` of a folder in the order of their names. Raises UserError if there is none."""
    place = Path(path).expanduser()
    files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"The haystack '{path}' has no *.txt; name a file of text, or a folder with such files.")
    try:
        found = Prose(place.resolve().name, " ".join(file.read_text(encoding="utf-8") for file in files))
    except OSError as error:
        raise UserError(f"The haystack '{path}' cannot be read: {error.strerror}; name a file of text.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The haystack '{path}' is not text in UTF-8; convert it.") from error
    if not len(found):
        raise UserError(f"The haystack '{path}' has no words; name a file of text.")
    return found
