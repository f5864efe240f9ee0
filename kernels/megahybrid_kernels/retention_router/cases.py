"""How the retention router is judged."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Make, Op, Shape, normal, packed
from megahybrid_kernels.judging.streamed import PIECES, STEPS, Streamed, streamed_case
from megahybrid_kernels.retention_router import Dropout, RouterParameters, RouterState, margin
from megahybrid_kernels.sequences import Sequences


@dataclass(frozen=True)
class RetentionRouter(Shape):
    """Of `heads` key-value heads."""

    heads: int
    head_dim: int
    taps: int = 3
    dilation: int = 2

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        return [self._whole(lengths, 0.1)]

    def more_cases(self, lengths: Lengths, varied: bool) -> list[Case]:
        """Without dropout; prefill and decode."""
        streamed = self._streamed()
        more = [self._whole(lengths, 0.0, "without dropout"), streamed_case(streamed, "prefill", PIECES, "long")]
        return [*more, streamed_case(streamed, "step", STEPS)]

    def _whole(self, lengths: Lengths, dropped: float, variant: str = "") -> Case:
        def route(op: Op, x: Inputs, sequences: Sequences) -> Tensor:
            keys = torch.arange(sequences.tokens, device=x["k"].device) * 2654435761 % 2**32
            dropout = Dropout(dropped, keys) if dropped else None
            scores, k, v = op(x["k"], x["v"], _parameters(x), sequences, dropout=dropout, dilation=self.dilation)
            return torch.cat([scores[..., None], k, v], -1)

        shape = f"{packed(lengths)} heads={self.heads} head_dim={self.head_dim}"
        place = ("retention_router", "retention_router", "retention_scores")
        return Case(*place, shape, lengths, self._make(sum(lengths)), route, variant=variant)

    def _streamed(self) -> Streamed:
        def first(x: Inputs, count: int) -> RouterState:
            return RouterState.empty(count, _parameters(x), self.dilation)

        def call(op: Op, x: Inputs, sequences: Sequences, state: RouterState) -> tuple[Tensor, Any]:
            return op(x["k"], x["v"], _parameters(x), sequences, state, self.dilation)

        place = ("retention_router", "retention_router", "retention_scores_streamed")
        return Streamed(*place, self._make, first, call, late=margin(self.taps, self.dilation))

    def _make(self, tokens: int) -> Make:
        """Keys, values and the parameters, which `_parameters` puts together."""
        rows = (tokens, self.heads, self.head_dim)

        def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
            fans = [2 * self.head_dim >> halvings for halvings in range(4)]
            inputs = normal(dtype, generator, k=rows, v=rows)
            for number, (fan, out) in enumerate(pairwise(fans)):
                weight = normal(dtype, generator, weight=(self.heads * out, fan, self.taps))["weight"]
                inputs[f"weight{number}"] = weight * (2 / (self.taps * fan)) ** 0.5
                inputs |= normal(dtype, generator, **{f"bias{number}": (self.heads * out,)})
            return inputs | normal(dtype, generator, projection=(self.heads, fans[-1]), projection_bias=(self.heads,))

        return make


def _parameters(x: Inputs) -> RouterParameters:
    weights, biases = ([x[f"{name}{number}"] for number in range(3)] for name in ("weight", "bias"))
    return RouterParameters(tuple(weights), tuple(biases), x["projection"], x["projection_bias"])
