"""Encoding word by word gives what encoding the whole gives, whatever the tokenizer."""

from __future__ import annotations

import pytest

from megahybrid.tasks import encoding
from megahybrid.tasks.encoding import WordTokens
from tests.tasks.texts import FAITHFUL, byte_level, few_letters, lower_case, over_spaces, prose_text

TEXTS = [
    "",
    " ",
    "a",
    "a  b   c \n d\n\n\n e \t f ",
    "again.\n The grass is: 1234567.\nOne of VAR ABC = VAR DEF  The 01-ab",
    prose_text(500),
    "\n".join(prose_text(30, seed) for seed in range(5)),
    "  indented\n    more\n",
    "é 🙂 naïve…  «so» <s> <|endoftext|> <unk>",
]


@pytest.mark.parametrize("name", FAITHFUL)
def test_words_give_the_tokens_of_the_whole(name):
    tokenizer = FAITHFUL[name]()
    words = WordTokens(tokenizer)
    assert words._by_word == (name != "sentence_pieces")
    for text in TEXTS:
        whole = tokenizer.encode(text)
        assert words.count(text) == len(whole)
        assert words.locate(text, [])[0] == whole


@pytest.mark.parametrize("name", FAITHFUL)
def test_spans_are_the_tokens_that_reach_into_a_range(name):
    tokenizer = FAITHFUL[name]()
    text = "It is: 1234567.\nOne  of the numbers for odd-hat is 7654321 and naïve\n x"
    whole = tokenizer.encode(text)
    # The characters of each token by what the text decodes to up to it; a token may end within a character.
    decoded = [tokenizer.decode(whole[:end]).rstrip("\ufffd") for end in range(len(whole) + 1)]
    ends = [len(each) for each in decoded]
    assert decoded[-1] == text
    for wanted in ("1234567", "is", "One  of", "odd-hat is 7654321", "naïve\n x", "is: 12"):
        begin = text.index(wanted)
        end = begin + len(wanted)
        first = max(token for token in range(len(whole)) if ends[token] <= begin)
        last = min(token for token in range(len(whole)) if ends[token + 1] >= end)
        _, (span,) = WordTokens(tokenizer).locate(text, [(begin, end)])
        assert tuple(span) == (first, last + 1), wanted
        assert tokenizer.encode_spans(text, [(begin, end)]) == (whole, [(first, last + 1)])


def test_words_are_forgotten_before_there_are_too_many(monkeypatch):
    tokenizer = byte_level()
    words = WordTokens(tokenizer)
    monkeypatch.setattr(encoding, "_MOST_WORDS", 50)
    for number in range(10):
        text = " ".join(f"w{number}x{each}" for each in range(30)) + " as ever"
        assert words.locate(text, [])[0] == tokenizer.encode(text)
        assert len(words._known) <= 50


@pytest.mark.parametrize("make", [lower_case, few_letters, over_spaces])
def test_those_that_cannot_write_everything_are_asked_as_they_are(make):
    tokenizer = make()
    for text in TEXTS[:6]:
        assert WordTokens(tokenizer).locate(text, [])[0] == tokenizer.encode(text)
