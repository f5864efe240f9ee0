"""Numbers as they are written for people."""

import pytest

from megahybrid.readable import short


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (512, "512"), (999.4, "999"), (999.6, "1K"), (999_499, "999K"), (999_600, "1M"),
     (43_720_000, "43.7M"), (-2e9, "-2B"), (2.8e13, "28T")],
)  # fmt: skip
def test_three_digits_at_most(value, text):
    assert short(value) == text
