"""Micro-batches with the shapes of a model's ops, and the cases they make."""

from __future__ import annotations

from dataclasses import dataclass

from megahybrid_kernels.judging import shapes
from megahybrid_kernels.judging.case import Case, Lengths


@dataclass(frozen=True)
class Size:
    """The lengths of the documents in a micro-batch, and how a model calls each op on one rank.

    Attributes:
        varied: whether heads are also grouped, and values also wider than keys, though they are not here.
    """

    lengths: Lengths
    shapes: tuple[shapes.Shape, ...]
    varied: bool = False

    def cases(self) -> list[Case]:
        """Every op that a pass over whole documents runs."""
        return [case for shape in self.shapes for case in shape.cases(self.lengths)]

    def every_case(self) -> list[Case]:
        """These, prefill and decode, and what other shapes make of an op; cases of one op are neighbours."""
        more = [case for shape in self.shapes for case in shape.more_cases(self.lengths, self.varied)]
        every = self.cases() + more
        order = {op: number for number, op in enumerate(dict.fromkeys(case.op for case in every))}
        return sorted(every, key=lambda case: order[case.op])


def _shapes(
    hidden: int, intermediate: int, heads: int, head_dim: int, delta_heads: int, delta_dim: int,
    window: int, eviction_window: int, buffer: int, blocks: int,
) -> tuple[shapes.Shape, ...]:  # fmt: skip
    """Of a model with every kind of layer; windows, buffer and blocks are those in documents as short as here."""
    return (
        shapes.GatedDeltaRule(delta_heads, delta_dim, delta_dim),
        shapes.CausalConv1d(delta_heads * delta_dim),
        shapes.GatedRMSNorm(delta_heads, delta_dim),
        shapes.Attention(heads, head_dim),
        shapes.Attention(heads, head_dim, window=1024, near_window=window),
        shapes.Rotary(heads, head_dim),
        shapes.LTEAttention(heads, head_dim, near_window=eviction_window, near_buffer=buffer),
        shapes.ExitPositions(heads, near_window=eviction_window, near_buffer=buffer),
        shapes.RetentionRouter(heads, head_dim),
        shapes.DropoutKeys(4),
        shapes.NativeSparseAttention(2, head_dim, heads, near_num_blocks=blocks, near_window=window // 2),
        shapes.RMSNorm(hidden),
        shapes.SwiGLU(intermediate),
        shapes.RowProducts(hidden, intermediate),
        shapes.GatedRowProduct(hidden, delta_heads, delta_dim),
        shapes.LinearCrossEntropy(hidden, intermediate),
    )


CHECKED: Lengths = (513, 1, 64, 300, 98, *(3,) * 16)
"""Short enough for float64, with borders beside the kernels' own."""

SIZES = {
    # With the head dims of the recipes.
    "check": Size(CHECKED, _shapes(1024, 1408, 2, 64, 2, 128, 128, 95, 64, 4), varied=True),
    # Eight samples of 512 tokens of a small model, one of them made of two documents.
    "small": Size((512,) * 7 + (301, 211), _shapes(128, 384, 4, 32, 4, 32, 128, 63, 64, 4)),
    # A 0.4B model's at 4096 tokens a sample.
    "large": Size((4096,) * 7 + (3001, 1000, 95), _shapes(1024, 2816, 16, 64, 8, 128, 1024, 768, 512, 16)),
}
