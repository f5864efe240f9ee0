"""How attention, full or over a sliding window, is judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megahybrid_kernels.attention import GrowingCache, KeyValueCache
from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Make, Op, Shape, normals, packed
from megahybrid_kernels.judging.streamed import PIECES, STEPS, Streamed, many_steps, streamed_case
from megahybrid_kernels.sequences import Sequences

# Few, so that many tokens leave it within the steps.
_STEPS_WINDOW = 23


@dataclass(frozen=True)
class Attention(Shape):
    """`heads` key-value heads, each of `groups` query heads; near_window: in place of the window in short documents."""

    heads: int
    head_dim: int
    groups: int = 1
    window: int | None = None
    near_window: int = 128

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        return [self._near()._whole(lengths)]

    def more_cases(self, lengths: Lengths, varied: bool) -> list[Case]:
        """Other lengths and groups; prefill and decode."""
        steps = self if self.window is None else replace(self, window=_STEPS_WINDOW)
        # A few heads, since the reference takes every pair of tokens in float64.
        few, grouped = replace(self, heads=min(self.heads, 2)), varied and self.groups == 1
        more = [streamed_case(steps._streamed(), "step", STEPS)]
        more += [streamed_case(steps._streamed(), "step", many_steps(self.heads), "many")]
        more += [streamed_case(few._streamed(), "prefill", PIECES, "long")]
        if grouped:
            steps, few = replace(steps, groups=2), replace(few, groups=2)
            more += [streamed_case(steps._streamed(), "step", STEPS, "grouped")]
            more += [streamed_case(few._streamed(), "prefill", PIECES, "grouped")]
            more += [few._near()._whole(lengths, "grouped")]
        return more

    def _near(self) -> Attention:
        return self if self.window is None else replace(self, window=self.near_window)

    @property
    def _op(self) -> str:
        return f"attention_{'full' if self.window is None else 'window'}"

    def _rows(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of q, k and v."""
        rows = (tokens, self.heads, self.head_dim)
        return {"q": (tokens, self.heads * self.groups, self.head_dim), "k": rows, "v": rows}

    def _whole(self, lengths: Lengths, variant: str = "") -> Case:
        """The op over whole documents, with this very window."""
        window = "" if self.window is None else f" window={self.window}"
        return Case(
            self._op,
            "attention",
            "attention",
            f"{packed(lengths)} heads={self.heads * self.groups} head_dim={self.head_dim}{window}",
            lengths,
            normals(**self._rows(sum(lengths))),
            lambda op, x, sequences: op(x["q"], x["k"], x["v"], sequences, self.window),
            variant=variant,
        )

    def _streamed(self) -> Streamed:
        """The op with a cache."""
        kind, slots = (GrowingCache, ()) if self.window is None else (KeyValueCache, (self.window,))
        cache = "growing" if self.window is None else "window"

        def make(tokens: int) -> Make:
            return normals(**self._rows(tokens))

        def first(x: Inputs, count: int) -> Any:
            return kind.empty(count, self.heads, self.head_dim, *slots, dtype=x["k"].dtype, device=x["k"].device)

        def call(op: Op, x: Inputs, sequences: Sequences, state: Any) -> tuple[Tensor, Any]:
            return op(*x.values(), state, sequences, *slots)

        place, reference = ("attention", "attention_with_cache"), f"attention_with_{cache}_cache"
        return Streamed(self._op, *place, make, first, call, reference=reference)
