"""Shares and intervals against closed forms and counts by hand."""

import math

import numpy as np
import pytest

from megahybrid.evaluation.results import Answers, effective_number, short, summarise, table, wilson


def line(index, right, in_window, length=1024, depth=None, kept=None, place=None, nll=None, policy="learned", **more):
    count = len(right)
    return {
        "mode": "forced",
        "policy": policy,
        "length": length,
        "depth": depth,
        "index": index,
        "real_length": length - index,
        "distance": [5] * count,
        "in_window": in_window,
        "right": right,
        "first": right[0],
        "place": place or [0.5] * count,
        "kept": kept or [None] * count,
        "nll": nll or [None] * count,
        "text": ["x"] * count,
        **more,
    }


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (29, 29, 0.8830, 1)],  # Newcombe 1998
)
def test_wilson_against_published_intervals(right, n, low, high):
    assert wilson(right / n, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_is_where_the_score_test_just_rejects():
    for share, n in ((0.3, 20), (0.9, 500)):
        for end in wilson(share, n):
            assert abs(share - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959964, abs=1e-5)


def answers(rights):
    return Answers.of([line(index, right, [0] * len(right)) for index, right in enumerate(rights)])


def test_answers_of_a_sample_that_are_right_together_count_as_one():
    samples = np.random.default_rng(0).integers(0, 2, 4000)
    together = effective_number(answers([[right] * 8 for right in samples.tolist()]))
    assert together == pytest.approx(4000, rel=0.01)
    apart = np.random.default_rng(1).integers(0, 2, (4000, 8))
    assert effective_number(answers(apart.tolist())) == pytest.approx(32000, rel=0.1)
    assert effective_number(answers([[right] for right in samples.tolist()])) == 4000
    assert effective_number(answers([[1] * 8] * 3)) == effective_number(answers([[0, 1]] * 3)) == 3
    assert effective_number(answers([[1, 0, 1, 1]])) == 1


def test_counts_by_window_keeping_and_depth():
    lines = [
        line(0, [1, 0, 1], [1, 0, 0], kept=[1.0, 0.0, 0.5], place=[0.95, 0.04, 1.0], nll=[0.5, 2.0, 0.5]),
        line(1, [0, 0, 1], [0, 0, 0], kept=[0.25, 0.0, 0.0], place=[0.04, 0.5, 0.5], nll=[1.0, 1.0, 1.0]),
    ]
    (found,) = summarise("mqar", lines)
    assert (found["n"], found["samples"], found["accuracy"]) == (6, 2, 0.5)
    assert found["in_window"]["n"] == 1 and found["in_window"]["accuracy"] == 1
    assert found["beyond"]["n"] == 5 and found["beyond"]["accuracy"] == 0.4
    assert found["beyond_kept"]["n"] == 2 and found["beyond_kept"]["accuracy"] == 0.5
    assert found["beyond_evicted"]["n"] == 3 and found["beyond_evicted"]["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["recency_null"] == pytest.approx(1 / 6, abs=1e-6)
    assert found["kept"] == pytest.approx(0.75 / 5) and found["nll"] == 1
    assert (found["first"]["n"], found["first"]["accuracy"]) == (2, 0.5)
    assert found["real_length"] == {"least": 1023, "mean": 1023.5, "most": 1024}
    assert [(cell["depth"], cell["n"], cell["accuracy"]) for cell in found["depths"]] == [
        (0.05, 2, 0), (0.55, 2, 0.5), (0.95, 2, 1),
    ]  # fmt: skip


def test_depths_are_those_asked_for_where_a_needle_can_be_put():
    lines = [line(n, [n], [0], depth=depth, place=[0.5], haystack="noise") for n, depth in enumerate((0.0, 1.0))]
    (found,) = summarise("niah_single_1", lines)
    assert [(cell["depth"], cell["accuracy"]) for cell in found["depths"]] == [(0, 0), (1, 1)]
    assert found["haystack"] == ["noise"]


def test_modes_policies_and_lengths_stand_apart():
    lines = [line(0, [1], [0], 2048), line(0, [0], [0], 512), line(0, [1], [0], 512, policy="random")]
    found = summarise("mqar", lines)
    assert [(each["policy"], each["length"], each["accuracy"]) for each in found] == [
        ("learned", 512, 0), ("learned", 2048, 1), ("random", 512, 1),
    ]  # fmt: skip
    rows = table(found).splitlines()
    assert rows[2].split()[:5] == ["mqar", "forced", "learned", "2k", "2048"] and "100.0 [20.7, 100.0]" in rows[2]


def test_answers_without_a_needle_are_neither_near_nor_far():
    (found,) = summarise("copy", [line(0, [1], [None], place=[None])])
    assert found["n"] == 1 and found["in_window"]["n"] == found["beyond"]["n"] == 0
    assert found["recency_null"] is None and found["depths"] == []
    assert "- of 0" in table([found])


def test_lengths_are_written_as_they_are_asked_for():
    assert [short(n) for n in (512, 1000, 1024, 65536, 2**20)] == ["512", "1000", "1k", "64k", "1m"]
