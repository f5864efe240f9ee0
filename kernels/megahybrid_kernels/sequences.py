"""The borders of packed sequences, made once a micro-batch and read by every op."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from megahybrid_kernels.integers import cdiv

Made = TypeVar("Made")

# Twice as many, a window beyond the last row included, still have numbers of 32 bits.
MOST_TOKENS = 2**30


def _check_tokens(tokens: int) -> None:
    if tokens > MOST_TOKENS:
        raise ValueError(f"at most {MOST_TOKENS} tokens can be packed together, not {tokens}")


def numbered(counts: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of groups of `counts` things, int32, laid end to end, `total` in all: each thing's group (int64), its number
    within it, and how many things are before each group (int32)."""
    ends = counts.cumsum(0, dtype=torch.int32)
    before = ends - counts
    thing = torch.arange(total, dtype=torch.int32, device=counts.device)
    group = torch.searchsorted(ends, thing, right=True)
    return group, thing - before[group], before


@dataclass(frozen=True)
class Tiles:
    """Sequences cut into tiles of `size` tokens, each from its own first token on; its last tile may hold fewer.

    Attributes:
        size: tokens of a tile.
        firsts: int32 `[tiles]`, each tile's first row.
        before: int32 `[tokens]`, how many tiles belong to the sequences before each token's.
    """

    size: int
    firsts: Tensor
    before: Tensor

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.firsts.shape[0]


@dataclass(frozen=True)
class Sequences:
    """Sequences laid end to end in one row of tokens, as `cu_seqlens` describes them.

    Ops read `cu_seqlens` on the device and `lengths` on the host, so that none of them has to synchronise.

    Rows are numbered in 32 bits, so that there are at most 2^30 of them.

    Attributes:
        cu_seqlens: int32 `[sequences + 1]` on the ops' device; sequence n holds the tokens from `cu_seqlens[n]` to
            before `cu_seqlens[n + 1]`.
        lengths: the same on the host, tokens per sequence, every one at least 1.
        starts: int64 `[sequences]`, the absolute position of each sequence's first token here when an earlier part of
            it was already processed and its state is passed along; None when all begin at position 0.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    starts: Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu", starts: Tensor | None = None) -> Sequences:
        """Sequences of the given lengths. Raises ValueError for an empty list, a length below 1 or too many tokens."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every sequence needs at least one token, but the lengths are {list(lengths)}")
        _check_tokens(sum(lengths))
        borders = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
        return cls(borders.to(device, non_blocking=True), tuple(lengths), starts)

    @property
    def count(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens over all sequences."""
        return sum(self.lengths)

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """`cu_seqlens` on the host."""
        total, borders = 0, [0]
        for length in self.lengths:
            total += length
            borders.append(total)
        return tuple(borders)

    @cached_property
    def index(self) -> Tensor:
        """int64 `[tokens]`: which sequence each token belongs to."""
        rows = torch.arange(self.tokens, dtype=self.cu_seqlens.dtype, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:], rows, right=True)

    @cached_property
    def offsets(self) -> Tensor:
        """int64 `[tokens]`: how many tokens of the same sequence precede each token here (`starts` not counted)."""
        return torch.arange(self.tokens, device=self.cu_seqlens.device) - self.begins

    @cached_property
    def positions(self) -> Tensor:
        """int64 `[tokens]`: absolute position of each token in its sequence, 0-based."""
        if self.starts is None:
            return self.offsets
        # Of one token each the places are the starts, and a step of decoding needs no more.
        return self.starts.contiguous() if self.tokens == self.count else self.offsets + self.starts[self.index]

    @cached_property
    def begins(self) -> Tensor:
        """int32 `[tokens]`: the row of the first token of each token's sequence."""
        return self.cu_seqlens.to(torch.int32)[self.index]

    @cached_property
    def ends(self) -> Tensor:
        """int32 `[tokens]`: the row after the last token of each token's sequence."""
        return self.cu_seqlens.to(torch.int32)[1:][self.index]

    @cached_property
    def remaining(self) -> Tensor:
        """int64 `[tokens]`: how many tokens of the same sequence follow each token here."""
        return self.ends - 1 - torch.arange(self.tokens, device=self.cu_seqlens.device)

    def once(self, make: Callable[..., Made], *arguments: object) -> Made:
        """`make(self, *arguments)`, made once for all layers that read these sequences."""
        key = make, *arguments
        if key not in self._made:
            self._made[key] = make(self, *arguments)
        return self._made[key]

    def behind(self, rows: int) -> Sequences:
        """The same sequences with `rows` more rows before each one's own, all counted from 0; made once."""
        return self.once(_behind, rows)

    def document(self, length: int) -> Sequences:
        """One of so many tokens, alone, made once."""
        return self.once(_document, length)

    def part(self, first: int, end: int) -> Sequences:
        """What rows `first` to before `end` have of sequences that begin here, `starts` where in its sequence the first
        row stands; made once."""
        return self.once(_part, first, end)

    def longer(self, rows: int) -> Sequences:
        """The same sequences with `rows` more rows before the first one's own, all counted from 0; made once."""
        return self.once(_longer, rows)

    def rows_behind(self, rows: int) -> Tensor:
        """int64 `[tokens]`: where the tokens stand in `behind(rows)`."""
        return torch.arange(self.tokens, device=self.cu_seqlens.device) + (self.index + 1) * rows

    def tiles(self, size: int) -> Tiles:
        """The sequences in tiles of `size` tokens, made once."""
        return self.once(_tiles, size)

    @cached_property
    def _made(self) -> dict[tuple, object]:
        return {}


def _behind(sequences: Sequences, rows: int) -> Sequences:
    _check_tokens(sequences.tokens + sequences.count * rows)
    more = torch.arange(sequences.count + 1, dtype=torch.int32, device=sequences.cu_seqlens.device) * rows
    return Sequences(sequences.cu_seqlens + more, tuple(rows + length for length in sequences.lengths))


def _part(sequences: Sequences, first: int, end: int) -> Sequences:
    borders = sequences.borders
    one, last = bisect_right(borders, first) - 1, bisect_left(borders, end)
    own = sequences.cu_seqlens[one : last + 1]
    lengths = tuple(min(after, end) - max(before, first) for before, after in pairwise(borders[one : last + 1]))
    starts = None if borders[one] == first else (first - own[:-1].long()).clamp(min=0)
    return Sequences(own.clamp(first, end) - first, lengths, starts)


def _longer(sequences: Sequences, rows: int) -> Sequences:
    first, *others = sequences.lengths
    _check_tokens(sequences.tokens + rows)
    return Sequences(torch.cat([sequences.cu_seqlens[:1], sequences.cu_seqlens[1:] + rows]), (first + rows, *others))


def _document(sequences: Sequences, length: int) -> Sequences:
    return Sequences.of((length,), sequences.cu_seqlens.device)


def _tiles(sequences: Sequences, size: int) -> Tiles:
    borders = sequences.cu_seqlens.to(torch.int32)
    total = sum(cdiv(length, size) for length in sequences.lengths)
    sequence, number, before = numbered((borders.diff() + size - 1) // size, total)
    return Tiles(size, borders[sequence] + number * size, before[sequences.index])
