"""When a generated text is right."""

import numpy as np

from megahybrid.evaluation.modes import _said
from megahybrid.tasks import Answer, Sample, Span

SAMPLE = Sample(np.arange(9), 3, (Answer(Span(3, 5), (), "1234567"), Answer(Span(5, 9), (), "Odd-Hat")))


def test_a_text_is_right_where_it_contains_an_answer_and_first_where_it_begins_with_it():
    for text, right, first in (
        (" 1234567 and odd-hat", [1, 1], 1),
        ("It is 1234567.", [1, 0], 0),
        ("12345678", [1, 0], 0),
        ("123456", [0, 0], 0),
        ("ODD-HAT", [0, 1], 0),
        ("", [0, 0], 0),
    ):
        found = _said(SAMPLE, text)
        assert (found.right, found.first, found.text) == (right, first, [text])
        assert found.nll == found.kept == [None, None]
