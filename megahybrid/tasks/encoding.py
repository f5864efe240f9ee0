"""Token ids of long texts that are made of the same words over and over."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from megahybrid.tasks.task import Span

if TYPE_CHECKING:
    from megahybrid.data.tokenizer import Tokenizer

_CUT = re.compile(r"(?<=\S)(?= )")
_MOST_WORDS = 500_000
_PROBE = (
    "A special magic number is hidden here, twice.\nOne of the special magic numbers for odd-hat is: 1234567. Yes.\n"
    'The grass  is "green". \nVAR ABCDE = VAR FGHIJ  It\'s 12% (or 3/4) of Rose Ashford: 609-323-7777\n The 9 of'
    " VAR X = 12345 The\n\n\n\nIs 01234567-89ab-4cde-8f01-23456789abcd right?  No!  Answer: they are: ABCDE FGHIJ"
)


class WordTokens:
    """Encodes word by word, each word once, where the tokenizer never joins what a space separates.

    That is so with all that split words first with the space before each, as byte-level tokenizers do; others are asked
    for the whole text. A text of a million tokens takes 0.3 s instead of 3.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._by_word = [*chain.from_iterable(self._pieces(_PROBE)[1])] == tokenizer.encode(_PROBE)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return sum(map(len, self._pieces(text)[1])) if self._by_word else len(self._tokenizer.encode(text))

    def locate(self, text: str, ranges: Sequence[tuple[int, int]]) -> tuple[list[int], list[Span]]:
        """Token ids of a text, and the tokens that hold each range of its characters, as `Tokenizer.encode_spans`."""
        if not self._by_word:
            ids, spans = self._tokenizer.encode_spans(text, ranges)
            return ids, [Span(*span) for span in spans]
        pieces, encoded = self._pieces(text)
        first_character = [0, *accumulate(map(len, pieces))]
        first_token = [0, *accumulate(map(len, encoded))]
        spans = []
        for begin, end in ranges:
            first, after = bisect_right(first_character, begin) - 1, bisect_left(first_character, end)
            start = first_character[first]
            _, ((at, until),) = self._tokenizer.encode_spans(
                "".join(pieces[first:after]), [(begin - start, end - start)]
            )
            spans.append(Span(first_token[first] + at, first_token[first] + until))
        return [*chain.from_iterable(encoded)], spans

    def _pieces(self, text: str) -> tuple[list[str], list[list[int]]]:
        """The text cut before each run of white space that begins with a space, and the ids of the pieces."""
        pieces = _CUT.split(text)
        known = self._known
        unknown = list({piece for piece in pieces if piece not in known})
        if len(known) + len(unknown) > _MOST_WORDS:
            # Another thread may go on with those there were.
            known, unknown = {}, list(set(pieces))
            self._known = known
        known.update(zip(unknown, self._tokenizer.encode_batch(unknown), strict=True))
        return pieces, [known[piece] for piece in pieces]


@lru_cache(maxsize=8)
def word_tokens(tokenizer: Tokenizer) -> WordTokens:
    """The one of a tokenizer."""
    return WordTokens(tokenizer)
