"""The layer pattern: which mixer every layer has, and where pipeline stages begin.

Grammar: one letter a layer, `(…)*n` repeats, `|` begins a pipeline stage, spaces are ignored. Examples:

    (GL)*3      → G L G L G L
    G(SF)*2     → G S F S F
    (GL)*2|(GL)*4   → two stages of 4 and 8 layers
    ((GGGF)*2|)*1GS → groups nest
"""

from __future__ import annotations

from dataclasses import dataclass

from megahybrid.errors import UserError
from megahybrid.mixers import KINDS


@dataclass(frozen=True)
class Pattern:
    """A parsed layer pattern.

    Attributes:
        letters: one letter a layer.
        stage_starts: layer numbers before which the text has a `|`, ascending.
    """

    letters: str
    stage_starts: tuple[int, ...] = ()

    def layers(self, letter: str) -> list[int]:
        """Numbers of the layers with this letter."""
        return [number for number, each in enumerate(self.letters) if each == letter]


def parse_pattern(text: str) -> Pattern:
    """Parse a layer pattern. Raises UserError for an unknown letter, an unbalanced bracket or a bad repeat."""
    compact = "".join(text.split())
    expanded, end = _group(compact, 0, text)
    if end < len(compact):
        raise UserError(f"model.pattern '{text}' has a ')' without a '(' before it; remove it.")
    letters, starts = [], []
    for char in expanded:
        if char == "|":
            starts.append(len(letters))
        else:
            letters.append(char)
    if not letters:
        raise UserError(f"model.pattern '{text}' has no layers; write letters of {', '.join(KINDS)}.")
    if starts and (starts[0] == 0 or starts[-1] == len(letters) or len(set(starts)) < len(starts)):
        raise UserError(f"model.pattern '{text}' has an empty pipeline stage; every '|' needs layers on both sides.")
    return Pattern("".join(letters), tuple(starts))


def _group(text: str, at: int, whole: str) -> tuple[str, int]:
    """Expand from `at` up to the closing bracket or the end; returns the letters and where it stopped."""
    parts = []
    while at < len(text) and text[at] != ")":
        char = text[at]
        if char == "(":
            inner, close = _group(text, at + 1, whole)
            if close == len(text):
                raise UserError(f"model.pattern '{whole}' has a '(' without its ')'; close it.")
            times, at = _repeat(text, close + 1, whole)
            parts.append(inner * times)
        elif char in KINDS or char == "|":
            parts.append(char)
            at += 1
        else:
            known = ", ".join(f"{letter} ({kind.title})" for letter, kind in KINDS.items())
            raise UserError(f"model.pattern '{whole}' has the unknown letter '{char}'; use {known}.")
    return "".join(parts), at


def _repeat(text: str, at: int, whole: str) -> tuple[int, int]:
    """Read `*n` after a bracket; a bracket without it stands once."""
    if at >= len(text) or text[at] != "*":
        return 1, at
    end = at + 1
    while end < len(text) and text[end].isdigit():
        end += 1
    times = int(text[at + 1 : end] or 0)
    if not 1 <= times <= 1000:
        raise UserError(f"model.pattern '{whole}' needs a number from 1 to 1000 after '*', as in (GL)*12.")
    return times, end
