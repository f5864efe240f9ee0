"""How native sparse attention is judged.

Which blocks a query selects depends on the last bit of scores that are nearly equal. So that the reference in float64
selects the same ones, scores of neighbours in rank are a fifth apart: some columns of a key hold the level of its
block, and a query asks for one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megahybrid_kernels.integers import cdiv
from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Make, Op, Shape, normal, packed
from megahybrid_kernels.judging.streamed import PIECES, SHORT, Rounds, Streamed, many_steps, streamed_case
from megahybrid_kernels.native_sparse_attention import NSACache, reference
from megahybrid_kernels.sequences import Sequences

# More than the blocks that a query selects.
_LONG = (4400, 300)
# Small, so that blocks are left out within a few steps: the reference takes one sequence after the other.
_SMALL = {"block_size": 16, "num_blocks": 4, "window": 23}
_STEPS: Rounds = ((45, 1, 30), *((1, 1, 1),) * 24)
# Columns that hold levels, and tokens in a row that ask for the same one.
_COLUMNS, _RUN = 4, 16


@dataclass(frozen=True)
class NativeSparseAttention(Shape):
    """`heads` key-value heads, each of `groups` query heads.

    Attributes:
        block_size, num_blocks, window: as the op takes them.
        near_num_blocks, near_window: in place of the others in short documents.
    """

    heads: int
    head_dim: int
    groups: int = 16
    block_size: int = 64
    num_blocks: int = 16
    window: int = 512
    near_num_blocks: int = 4
    near_window: int = 100

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        near = self._near()
        return [near._whole(lengths), near._selection(lengths)]

    def more_cases(self, lengths: Lengths, varied: bool) -> list[Case]:
        """Longer documents; prefill and decode."""
        # A few heads, since the reference takes every pair of tokens in float64.
        long, steps = replace(self, heads=min(self.heads, 2)), replace(self, **_SMALL)
        more = [long._whole(_LONG, "long"), long._selection(_LONG, "long")]
        more += [long._streamed("prefill", PIECES, "long"), long._streamed("prefill", SHORT, "short")]
        return [*more, steps._streamed("step", _STEPS), self._streamed("step", many_steps(self.heads)[:6], "many")]

    def _near(self) -> NativeSparseAttention:
        return replace(self, num_blocks=self.near_num_blocks, window=self.near_window)

    @property
    def _blocks(self) -> tuple[int, int]:
        return self.block_size, self.num_blocks

    def _said(self, lengths: Lengths) -> str:
        heads = f"heads={self.heads * self.groups}/{self.heads} head_dim={self.head_dim}"
        return f"{packed(lengths)} {heads} blocks={self.num_blocks}x{self.block_size} window={self.window}"

    def _whole(self, lengths: Lengths, variant: str = "") -> Case:
        return Case(
            "native_sparse_attention",
            "native_sparse_attention",
            "native_sparse_attention",
            self._said(lengths),
            lengths,
            self._make((lengths,)),
            lambda op, x, sequences: op(*x.values(), sequences, *self._blocks, self.window)[0],
            variant=variant,
        )

    def _selection(self, lengths: Lengths, variant: str = "") -> Case:
        """The blocks themselves, as ranks choose them that share a key-value head: of the last three quarters here."""
        rows = (sum(lengths) // 4, sum(lengths))

        def wrong(selection: Tensor, x: Inputs, sequences: Sequences) -> float:
            """Share of queries that select other blocks than the reference in float64."""
            q, k = x["q"][slice(*rows)].double(), x["k"].double()
            expected = reference.select_blocks(q, k, sequences, *self._blocks, rows)
            return (selection != expected).any(-1).double().mean().item()

        return Case(
            "select_blocks",
            "native_sparse_attention",
            "select_blocks",
            self._said(lengths),
            lengths,
            self._make((lengths,)),
            lambda op, x, sequences: op(x["q"][slice(*rows)], x["k"], sequences, *self._blocks, rows),
            backward=False,
            judge=wrong,
            variant=variant,
        )

    def _streamed(self, kind: str, rounds: Rounds, variant: str = "") -> Case:
        def first(x: Inputs, count: int) -> NSACache:
            sizes = (count, self.heads, self.head_dim, self.block_size)
            return NSACache.empty(*sizes, dtype=x["k"].dtype, device=x["k"].device)

        def call(op: Op, x: Inputs, sequences: Sequences, cache: NSACache) -> tuple[Tensor, NSACache]:
            return op(*x.values(), cache, sequences, *self._blocks, self.window)

        place = ("native_sparse_attention", "native_sparse_attention", "native_sparse_attention_with_cache")
        return streamed_case(Streamed(*place, lambda _: self._make(rounds), first, call), kind, rounds, variant)

    def _make(self, rounds: Rounds) -> Make:
        """Of sequences whose tokens come in these rounds."""
        ends = torch.tensor(rounds).cumsum(0)
        places = [
            (n, position)
            for new, end in zip(rounds, ends.tolist(), strict=True)
            for n, last in enumerate(end)
            for position in range(last - new[n], last)
        ]
        sequence, position = torch.tensor(places).T
        blocks = cdiv(int(ends[-1].max()), self.block_size)

        def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
            tokens, columns = len(places), _COLUMNS
            queries, rows = (tokens, self.heads, self.groups, self.head_dim), (tokens, self.heads, self.head_dim)
            x = normal(torch.float32, generator, q=queries, k=rows, v=rows)
            x["gates"] = torch.rand(tokens, self.heads * self.groups, 3, generator=generator)
            # Steps of a quarter around 0, which bfloat16 has exactly.
            levels = torch.rand(ends.shape[1], blocks, self.heads, columns, generator=generator).argsort(1)
            x["k"] *= 0.2
            x["k"][..., :columns] = (levels[sequence, position // self.block_size] - blocks // 2) / 4
            asked = torch.randint(
                columns, (ends.shape[1], cdiv(int(ends.max()), _RUN), self.heads), generator=generator
            )
            asked = asked[sequence, position // _RUN]
            x["q"][..., :columns] = self.head_dim**0.5 * torch.eye(columns)[asked][:, :, None]
            return {name: each.to(dtype) for name, each in (x | {"q": x["q"].flatten(1, 2)}).items()}

        return make
