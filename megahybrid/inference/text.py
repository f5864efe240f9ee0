"""From tokens to text that can be shown at once: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from megahybrid.data.tokenizer import Tokenizer

# Four tokens hold every byte of a character; twice that many make decoders that look at neighbours see the same ones.
_CONTEXT = 8
_UNFINISHED = "\ufffd"


class TextStream:
    """Decodes token by token, in constant time each; a character is held back until its last byte has come."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        if len(self._tokens) >= 4 * _CONTEXT:
            self._tokens = self._tokens[-_CONTEXT:]
            self._shown = len(self._settled())
        self._tokens.append(token)
        settled = self._settled()
        piece, self._shown = settled[self._shown :], max(self._shown, len(settled))
        return piece

    def finish(self) -> str:
        """What is left: bytes that no character came of."""
        return self._tokenizer.decode(self._tokens)[self._shown :]

    def _settled(self) -> str:
        """The text without what later bytes may change: up to three bytes, each shown as a replacement character."""
        text = self._tokenizer.decode(self._tokens)
        for _ in range(3):
            text = text.removesuffix(_UNFINISHED)
        return text


class StopFilter:
    """Passes text on up to a stop string, the first of some that is complete, in whatever pieces it comes."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be no part of a stop string, and whether one has come: then it is the text before it."""
        self._held += text
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)[1]], True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        free = len(self._held) - keep
        passed, self._held = self._held[:free], self._held[free:]
        return passed, False

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
