"""How attention under learnable token eviction is judged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Make, Op, Shape, normal, packed
from megahybrid_kernels.judging.streamed import PIECES, SHORT, STEPS, Streamed, many_steps, streamed_case
from megahybrid_kernels.lte_attention import Gate, LTECache
from megahybrid_kernels.lte_attention.gate import UNSEEN
from megahybrid_kernels.sequences import Sequences

# More than a chunk of far columns.
_LONG = (4400, 300)
# Small, so that many tokens leave the window, and the buffer, within the steps.
_STEPS_WINDOW, _STEPS_BUFFER, _STEPS_SINKS = 23, 12, 2


@dataclass(frozen=True)
class LTEAttention(Shape):
    """`heads` key-value heads, each of `groups` query heads.

    Attributes:
        window, buffer, sinks: keys of each kind.
        delay: tokens by which scores are late when they are streamed.
        near_window, near_buffer: in place of the others in short documents.
    """

    heads: int
    head_dim: int
    groups: int = 1
    window: int = 768
    buffer: int = 512
    sinks: int = 4
    delay: int = 6
    near_window: int = 95
    near_buffer: int = 64

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        near = self._near()
        return [near._whole(lengths, None), near._whole(lengths, near.buffer)]

    def more_cases(self, lengths: Lengths, varied: bool) -> list[Case]:
        """Other lengths and groups; prefill and decode."""
        # A few heads, since the reference takes every pair of tokens in float64.
        long = replace(self, heads=min(self.heads, 2))
        # A token may not leave the window before its score has come.
        window = max(_STEPS_WINDOW, self.delay)
        steps = replace(self, window=window, buffer=_STEPS_BUFFER, sinks=_STEPS_SINKS)
        more = [long._whole(_LONG, None, "long"), long._whole(_LONG, long.buffer, "long")]
        more += [streamed_case(long._streamed(), "prefill", PIECES, "long")]
        more += [streamed_case(long._streamed(), "prefill", SHORT, "short")]
        more += [streamed_case(steps._streamed(), "step", STEPS)]
        more += [streamed_case(self._streamed(), "step", many_steps(self.heads), "many")]
        for gate in UNSEEN:
            more += [self._near()._whole(lengths, self.near_buffer, f"{gate} gate", gate)]
        if varied and self.groups == 1:
            near, long, steps = (replace(each, groups=2) for each in (self._near(), long, steps))
            more += [near._whole(lengths, near.buffer, "grouped")]
            more += [streamed_case(long._streamed(), "prefill", PIECES, "grouped")]
            more += [streamed_case(steps._streamed(), "step", STEPS, "grouped")]
        return more

    def _near(self) -> LTEAttention:
        return replace(self, window=self.near_window, buffer=self.near_buffer)

    def _whole(self, lengths: Lengths, cap: int | None, variant: str = "", gate: Gate = "value") -> Case:
        name, share = ("uncapped", 0.12) if cap is None else ("capped", 0.3)
        heads = f"heads={self.heads * self.groups} head_dim={self.head_dim}"
        limits = f"window={self.window} kept={share}" + ("" if cap is None else f" buffer={cap}")
        return Case(
            f"lte_attention_{name}",
            "lte_attention",
            "lte_attention",
            f"{packed(lengths)} {heads} {limits}",
            lengths,
            self._make(sum(lengths), share),
            lambda op, x, sequences: op(*x.values(), sequences, self.window, self.sinks, cap, gate),
            variant=variant,
        )

    def _make(self, tokens: int, share: float) -> Make:
        """q, k, v and scores of which `share` are positive."""
        rows = (tokens, self.heads, self.head_dim)

        def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
            queries = (tokens, self.heads * self.groups, self.head_dim)
            inputs = normal(dtype, generator, q=queries, k=rows, v=rows)
            return inputs | {"score": torch.rand(rows[:2], generator=generator) - (1 - share)}

        return make

    def _streamed(self) -> Streamed:
        def first(x: Inputs, count: int) -> LTECache:
            sizes = (count, self.heads, self.head_dim, self.window, self.buffer)
            return LTECache.empty(*sizes, dtype=x["k"].dtype, device=x["k"].device)

        def call(op: Op, x: Inputs, sequences: Sequences, cache: LTECache) -> tuple[Tensor, LTECache]:
            return op(*x.values(), cache, sequences, self.window, self.sinks, self.buffer, self.delay)

        place = ("lte_attention", "lte_attention", "lte_attention_with_cache")
        return Streamed(*place, lambda tokens: self._make(tokens, 0.4), first, call)
