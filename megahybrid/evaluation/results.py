"""From a line a sample to shares with intervals, by length and depth, inside the window and beyond it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Line = dict[str, Any]
Entry = dict[str, Any]

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_BINS = 10  # of depth, where needles stand where they fall


class Answers(NamedTuple):
    """Every answer of some samples, each array `[answers]`; nan stands for what is not known.

    Attributes:
        sample: which sample it belongs to.
        right, in_window: 1 or 0.
        kept: share of heads and layers whose state held the needle.
        nll: nats a token.
        depth: where the needle stands, as asked for, or the middle of its tenth of the context.
    """

    sample: NDArray[np.int64]
    right: NDArray[np.float64]
    in_window: NDArray[np.float64]
    kept: NDArray[np.float64]
    nll: NDArray[np.float64]
    depth: NDArray[np.float64]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> Answers:
        """Those of lines of TASK.jsonl."""
        counts = [len(line["right"]) for line in lines]
        columns = [
            np.array([value for line in lines for value in line[name]], dtype=np.float64)
            for name in ("right", "in_window", "kept", "nll")
        ]
        asked = np.repeat(np.array([line["depth"] for line in lines], dtype=np.float64), counts)
        place = np.array([value for line in lines for value in line["place"]], dtype=np.float64)
        tenth = (np.minimum(np.floor(place * _BINS), _BINS - 1) + 0.5) / _BINS
        return cls(np.repeat(np.arange(len(lines)), counts), *columns, np.where(np.isnan(asked), tenth, asked))

    def where(self, chosen: NDArray[np.bool_]) -> Answers:
        """Some of them."""
        return Answers(*(column[chosen] for column in self))


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share of `n` independent trials (Wilson 1927, equation 4)."""
    middle, spread = share + _Z**2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = ((middle + sign * spread) / (1 + _Z**2 / n) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def effective_number(answers: Answers) -> float:
    """How many independent answers say as much as these: answers of one sample may be right and wrong together.

    p (1 − p) over the variance of the share, taken between samples (Korn and Graubard 1998), and at most their number;
    that of the samples where they do not differ, which tells nothing of how answers hang together.
    """
    n, share = len(answers.right), answers.right.mean()
    sums = np.bincount(answers.sample, answers.right - share)[np.unique(answers.sample)]
    if len(sums) in (1, n):
        return len(sums)
    variance = (sums**2).sum() / n**2 * len(sums) / (len(sums) - 1)
    return min(n, share * (1 - share) / variance) if variance > 0 else len(sums)


def score(answers: Answers) -> Entry:
    """Number, share of right ones and its interval; None for what nothing is known of."""
    n = len(answers.right)
    if n == 0:
        return {"n": 0, "accuracy": None, "interval": None}
    share = float(answers.right.mean())
    low, high = wilson(share, effective_number(answers))
    return {"n": n, "accuracy": round(share, 6), "interval": [round(low, 6), round(high, 6)]}


def scores(answers: Answers) -> Entry:
    """All that is said of some answers: of all, of those inside the window and beyond it, and of the latter by whether
    any head held the needle."""
    beyond = answers.where(answers.in_window == 0)
    return {
        **score(answers),
        "in_window": score(answers.where(answers.in_window == 1)),
        "beyond": score(beyond),
        "beyond_kept": score(beyond.where(beyond.kept > 0)),
        "beyond_evicted": score(beyond.where(beyond.kept == 0)),
        "recency_null": _mean(answers.in_window),
        "kept": _mean(beyond.kept),
        "nll": _mean(answers.nll),
    }


def summarise(task: str, lines: Iterable[Line]) -> list[Entry]:
    """An entry for each mode, policy and length, with one for each depth in it, in the order of the lengths."""
    groups: dict[tuple[str, str, int], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["mode"], line["policy"], line["length"]), []).append(line)
    return [_entry(task, *key, groups[key]) for key in sorted(groups)]


def _entry(task: str, mode: str, policy: str, length: int, lines: list[Line]) -> Entry:
    lines = sorted(lines, key=lambda line: (line["depth"] is not None, line["depth"], line["index"]))
    answers, real = Answers.of(lines), [line["real_length"] for line in lines]
    depths = np.unique(answers.depth[~np.isnan(answers.depth)])
    return {
        "task": task,
        "mode": mode,
        "policy": policy,
        "length": length,
        "samples": len(lines),
        "real_length": {"least": min(real), "mean": round(sum(real) / len(real), 1), "most": max(real)},
        "haystack": sorted({line["haystack"] for line in lines if line.get("haystack")}),
        **scores(answers),
        "first": score(_firsts(lines)),
        "depths": [{"depth": float(depth), **scores(answers.where(answers.depth == depth))} for depth in depths],
    }


def _firsts(lines: Sequence[Line]) -> Answers:
    """The first answers alone, right where they are the first that was said."""
    right, unknown = np.array([line["first"] for line in lines], dtype=np.float64), np.full(len(lines), np.nan)
    return Answers(np.arange(len(lines)), right, unknown, unknown, unknown, unknown)


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return round(float(known.mean()), 6) if len(known) else None


def table(results: Sequence[Entry]) -> str:
    """The entries as a table for a terminal."""
    rows = [["task", "mode", "policy", "length", "real", "answers", "accuracy", "beyond the window", "recency null"]]
    for each in results:
        kind = [each["task"], each["mode"], each["policy"]]
        size = [short(each["length"]), f"{each['real_length']['mean']:.0f}", str(each["n"])]
        beyond = f"{_said(each['beyond'])} of {each['beyond']['n']}"
        rows.append([*kind, *size, _said(each), beyond, _percent(each["recency_null"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [cell.ljust(width) if number < 3 else cell.rjust(width)
             for number, (cell, width) in enumerate(zip(row, widths, strict=True))]
        ).rstrip()
        for row in rows
    )  # fmt: skip


def short(length: int) -> str:
    """4096 as 4k, as lengths are written in commands."""
    for size, suffix in ((2**20, "m"), (2**10, "k")):
        if length >= size and length % size == 0:
            return f"{length // size}{suffix}"
    return str(length)


def _said(score: Entry) -> str:
    if not score["n"]:
        return "-"
    low, high = (f"{100 * each:.1f}" for each in score["interval"])
    return f"{100 * score['accuracy']:.1f} [{low}, {high}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
