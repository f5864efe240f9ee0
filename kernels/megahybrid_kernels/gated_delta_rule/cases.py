"""How the gated delta rule is judged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Make, Op, Shape, normal, packed
from megahybrid_kernels.judging.streamed import PIECES, STEPS, Streamed, many_steps, nothing, streamed_case
from megahybrid_kernels.sequences import Sequences

_PLACE = ("gated_delta_rule",) * 3
# The plan cuts the first into segments; with gradients, and without.
_LONG = (2500, 130, 1)
_PIECES = ((4500, 70), *PIECES[1:])


@dataclass(frozen=True)
class GatedDeltaRule(Shape):
    """As many key as value heads."""

    heads: int
    key_dim: int
    value_dim: int

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        return [self._whole(lengths)]

    def more_cases(self, lengths: Lengths, varied: bool) -> list[Case]:
        """Other lengths and dims; prefill and decode."""
        more = [self._whole(_LONG, "in segments")]
        if varied:
            narrow, wide = replace(self, value_dim=max(1, self.key_dim // 2)), replace(self, value_dim=2 * self.key_dim)
            more += [narrow._whole(lengths, "narrow values"), wide._whole(_LONG, "wide values in segments")]
        rule = Streamed(*_PLACE, self._make, self._first, self._call)
        begun = replace(rule, first=nothing)
        more += [streamed_case(begun, "prefill", _PIECES, "long"), streamed_case(rule, "step", STEPS)]
        return [*more, streamed_case(begun, "step", many_steps(self.heads), "many")]

    def _whole(self, lengths: Lengths, variant: str = "") -> Case:
        return Case(
            *_PLACE,
            f"{packed(lengths)} heads={self.heads} head_dim={self.key_dim}",
            lengths,
            self._make(sum(lengths)),
            lambda op, x, sequences: op(*x.values(), sequences, output_final_state=False)[0],
            variant=variant,
        )

    def _make(self, tokens: int) -> Make:
        """Gates are as a model's at first."""
        keys, values = ((tokens, self.heads, dim) for dim in (self.key_dim, self.value_dim))

        def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
            inputs = normal(dtype, generator, q=keys, k=keys, v=values, a=keys[:2], b=keys[:2])
            rates = torch.empty(self.heads).uniform_(1e-4, 16, generator=generator).log()
            biases = torch.empty(self.heads).uniform_(-6, -2, generator=generator)
            return inputs | {"A_log": rates.to(dtype), "dt_bias": biases.to(dtype)}

        return make

    def _first(self, x: Inputs, count: int) -> Tensor:
        wider = torch.promote_types(x["k"].dtype, torch.float32)
        return x["k"].new_zeros(count, self.heads, self.key_dim, self.value_dim, dtype=wider)

    @staticmethod
    def _call(op: Op, x: Inputs, sequences: Sequences, state: Tensor) -> tuple[Tensor, Tensor]:
        return op(*x.values(), sequences, state, output_final_state=True)
