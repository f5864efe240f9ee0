"""RULER's rule, and the strict one."""

from __future__ import annotations

import pytest

from megahybrid.tasks.matching import begins_with, share_found


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("it is 123 and 456.", ["123", "456"], 1),
        ("it is 123.", ["123", "456"], 0.5),
        ("12 3", ["123"], 0),
        ("they are ABCDE", ["abcde"], 1),
        ("they are abcde", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"], 0.25),
        ("", ["1"], 0),
        ("91239", ["123"], 1),
        ("a\x00b", ["a\nb"], 1),
    ],
)
def test_share_found(text, answers, expected):
    assert share_found(text, answers) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 123", True),
        ("\n123. It is", True),
        ("123", True),
        ("1234", False),
        ("is 123", False),
        ("12", False),
        ("123a", False),
        ("", False),
        ("123-4", True),
    ],
)
def test_begins_with(text, expected):
    assert begins_with(text, "123") is expected


def test_case_counts_at_the_beginning():
    assert not begins_with("abc", "ABC")
