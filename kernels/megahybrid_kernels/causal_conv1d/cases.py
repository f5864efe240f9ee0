"""How the short causal convolution is judged."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Make, Op, Shape, normals, packed
from megahybrid_kernels.judging.streamed import PIECES, STEPS, Streamed, nothing, streamed_case
from megahybrid_kernels.sequences import Sequences

_PLACE = ("causal_conv1d",) * 3


@dataclass(frozen=True)
class CausalConv1d(Shape):
    """Of `channels` with `taps` weights each.

    variant: what sets it apart from a model's other convolutions. whole: columns of what x is the first of, which is so
    in prefill and decode alone; 0 where x is all.
    """

    channels: int
    taps: int = 4
    variant: str = ""
    whole: int = 0

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        if self.whole:
            return []
        return [
            Case(
                *_PLACE,
                f"{packed(lengths)} channels={self.channels} taps={self.taps}",
                lengths,
                self._make(sum(lengths)),
                lambda op, x, sequences: op(x["x"], x["weight"], sequences, output_final_state=False)[0],
                variant=self.variant,
            )
        ]

    def more_cases(self, lengths: Lengths, varied: bool) -> list[Case]:
        """Prefill and decode."""
        streamed = Streamed(*_PLACE, self._make, self._first, self._call)
        begun = replace(streamed, first=nothing)
        prefill = streamed_case(begun, "prefill", PIECES, self.variant or "long")
        return [prefill, streamed_case(streamed, "step", STEPS, self.variant)]

    def _make(self, tokens: int) -> Make:
        return normals(x=(tokens, self.whole or self.channels), weight=(self.channels, self.taps))

    def _first(self, x: Inputs, count: int) -> Tensor:
        return x["x"].new_zeros(count, self.taps - 1, self.channels)

    def _call(self, op: Op, x: Inputs, sequences: Sequences, state: Tensor) -> tuple[Tensor, Tensor]:
        return op(x["x"][:, : self.channels], x["weight"], sequences, state, output_final_state=True)
