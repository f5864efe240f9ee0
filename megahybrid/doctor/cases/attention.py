"""The ops of full and sliding window attention, and the rotary embedding that LTE shares with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from megahybrid.doctor.cases.case import Case, Inputs, Make, Op, Size, normals
from megahybrid.doctor.cases.streamed import PIECES, STEPS, Streamed, many_steps, streamed_case
from megahybrid_kernels import Sequences
from megahybrid_kernels.attention import GrowingCache, KeyValueCache

# Few, so that many tokens leave it within the steps.
_STEPS_WINDOW = 23


def cases(size: Size) -> list[Case]:
    """Over whole sequences."""
    return [_attention(size, None), _attention(size, size.window), _rotary(size)]


def more_cases(size: Size) -> list[Case]:
    """Other lengths and groups; prefill and decode."""
    # A few heads, since the reference takes every pair of tokens in float64.
    few, more = replace(size, heads=min(size.heads, 2)), []
    for window, far in ((None, None), (_STEPS_WINDOW, size.far_window)):
        for each, kind in _grouped(size):
            more += [streamed_case(_streamed(each, window), "step", STEPS, kind)]
        more += [streamed_case(_streamed(size, window), "step", many_steps(size.heads), "many")]
        for each, kind in _grouped(few):
            more += [streamed_case(_streamed(each, far), "prefill", PIECES, kind or "long")]
            more += [_attention(each, window and size.window, kind)] if kind else []
    return more


def _grouped(size: Size) -> list[tuple[Size, str]]:
    """The size, and where it is to be varied that with grouped heads, with the variant's name."""
    return [(size, "")] + [(replace(size, groups=2), "grouped")] * (size.varied and size.groups == 1)


def query_shapes(size: Size, tokens: int) -> dict[str, tuple[int, ...]]:
    """Of q, k and v."""
    rows = (tokens, size.heads, size.head_dim)
    return {"q": (tokens, size.heads * size.groups, size.head_dim), "k": rows, "v": rows}


def heads_shape(size: Size) -> str:
    """For the reader."""
    return f"{size.packed} heads={size.heads * size.groups} head_dim={size.head_dim}"


def _attention(size: Size, window: int | None, variant: str = "") -> Case:
    return Case(
        f"attention_{'full' if window is None else 'window'}",
        "attention",
        "attention",
        heads_shape(size) + ("" if window is None else f" window={window}"),
        size.sequences,
        normals(**query_shapes(size, size.tokens)),
        lambda op, x, sequences: op(x["q"], x["k"], x["v"], sequences, window),
        variant=variant,
    )


def _rotary(size: Size) -> Case:
    return Case(
        "rotary",
        "rotary",
        "rotary",
        heads_shape(size),
        size.sequences,
        normals(x=query_shapes(size, size.tokens)["q"]),
        lambda op, x, sequences: op(x["x"], sequences.positions, 10000.0),
    )


def _streamed(size: Size, window: int | None) -> Streamed:
    kind, slots = (GrowingCache, ()) if window is None else (KeyValueCache, (window,))
    name, cache = ("full", "growing") if window is None else ("window", "window")

    def make(tokens: int) -> Make:
        return normals(**query_shapes(size, tokens))

    def first(x: Inputs, count: int) -> Any:
        return kind.empty(count, size.heads, size.head_dim, *slots, dtype=x["k"].dtype, device=x["k"].device)

    def call(op: Op, x: Inputs, sequences: Sequences, state: Any) -> tuple[Tensor, Any]:
        return op(*x.values(), state, sequences, *slots)

    return Streamed(
        f"attention_{name}",
        "attention",
        "attention_with_cache",
        make,
        first,
        call,
        reference=f"attention_with_{cache}_cache",
    )
