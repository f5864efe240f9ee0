"""Formulas of FLOPs and memory that several kinds and megahybrid.scaling share."""

from __future__ import annotations


def linear(inputs: int, outputs: int) -> float:
    """FLOPs a token of a projection: 2 a weight."""
    return 2 * inputs * outputs


def mean_of_min(count: int, cap: int) -> float:
    """Mean over j = 1 … count of min(j, cap): the keys that causal queries see through a window of `cap`."""
    cap = min(count, cap)
    return (cap * (cap + 1) / 2 + (count - cap) * cap) / count
