"""The cache of attention without a window: every earlier token, in memory that grows by doubling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megahybrid_kernels.sequences import Sequences

SMALLEST_CAPACITY = 64


@dataclass
class _Room:
    """Memory that successive caches share; `turn` is that of the one cache that may write into it.

    Attributes:
        rows: what is kept, keys and values first, `[sequences, kv_heads, capacity // span, head_dim]` each.
        spans: tokens that a row of each stands for.
    """

    rows: tuple[Tensor, ...]
    spans: tuple[int, ...]
    turn: int = 0

    @property
    def k(self) -> Tensor:
        return self.rows[0]

    @property
    def v(self) -> Tensor:
        return self.rows[1]


@dataclass(frozen=True)
class GrowingCache:
    """Keys and values of all earlier tokens, slot = position.

    Appending leaves a cache as it was, though the next one shares its memory: a cache reads slots below its lengths
    only, and only the newest cache of a memory writes there. Appending to an older one copies first, as Go's slices do.

    Attributes:
        lengths: on the host, how many tokens of each sequence there are.
        room: its memory, whose `k` and `v` are `[sequences, kv_heads, capacity, head_dim]`.
        turn: this cache's.
    """

    lengths: tuple[int, ...]
    room: _Room
    turn: int = 0

    @classmethod
    def empty(
        cls,
        count: int,
        heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        spans: tuple[int, ...] = (1, 1),
    ) -> Self:
        """Cache of `count` sequences that have not begun; `spans` of its memory."""
        rows = tuple(torch.empty(count, heads, 0, head_dim, dtype=dtype, device=device) for _ in spans)
        return cls((0,) * count, _Room(rows, spans))

    @property
    def count(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Slots that there is memory for."""
        return self.room.k.shape[2]

    @property
    def slots(self) -> int:
        """Slots in use by the longest sequence."""
        return max(self.lengths)

    @property
    def k(self) -> Tensor:
        """`[sequences, kv_heads, slots, head_dim]`; slots from a sequence's length on mean nothing, but are finite."""
        return self.room.k[:, :, : self.slots]

    @property
    def v(self) -> Tensor:
        """As `k`."""
        return self.room.v[:, :, : self.slots]

    @property
    def bytes(self) -> int:
        """Bytes of its memory."""
        return self.bytes_of(self.capacity)

    def bytes_of(self, slots: int) -> int:
        """Bytes that so many slots take."""
        count, heads, _, head_dim = self.room.k.shape
        rows = sum(slots // span for span in self.room.spans)
        return count * heads * rows * head_dim * self.room.k.element_size()

    def append(self, k: Tensor, v: Tensor, sequences: Sequences) -> Self:
        """The cache after these tokens, k and v `[tokens, kv_heads, head_dim]`; `sequences.starts` are its lengths."""
        lengths = tuple(old + new for old, new in zip(self.lengths, sequences.lengths, strict=True))
        if self.capacity == 0 and SMALLEST_CAPACITY <= max(lengths) == min(lengths):
            return type(self)(lengths, self._filled(k, v))
        room = self.room if self._may_write(max(lengths), k) else self._copy(max(lengths))
        places = (sequences.index, slice(None), sequences.positions)
        room.k[places], room.v[places] = k, v
        room.turn += 1
        return type(self)(lengths, room, room.turn)

    def with_room(self, slots: int) -> Self:
        """This cache, in memory for at least `slots` slots into which it may write."""
        return self if self._may_write(slots, self.room.k) else type(self)(self.lengths, self._copy(slots))

    def after(self, tokens: int) -> Self:
        """The cache after `tokens` more of every sequence, which its memory holds already."""
        self.room.turn += 1
        return type(self)(tuple(length + tokens for length in self.lengths), self.room, self.room.turn)

    def packed(self, memory: Tensor) -> Tensor:
        """`room.k` or `room.v` without what is not in use, `[tokens of all sequences, kv_heads, head_dim]`."""
        return torch.cat([row[:, :length].transpose(0, 1) for row, length in zip(memory, self.lengths, strict=True)])

    def select(self, rows: Sequence[int]) -> Self:
        """The sequences `rows` alone, in this order; a sequence may come more than once."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.room.k.device)
        lengths = tuple(self.lengths[row] for row in rows)
        return type(self)(lengths, _Room(tuple(x.index_select(0, index) for x in self.room.rows), self.room.spans))

    def join(self, other: Self) -> Self:
        """These sequences followed by those of `other`."""
        capacity = max(self.capacity, other.capacity)
        first, second = self._with(capacity), other._with(capacity)
        rows = tuple(torch.cat(pair) for pair in zip(first.rows, second.rows, strict=True))
        return type(self)(self.lengths + other.lengths, _Room(rows, self.room.spans))

    def _may_write(self, slots: int, k: Tensor) -> bool:
        recorded = torch.is_grad_enabled() and (k.requires_grad or self.room.k.requires_grad)
        frozen = self.room.k.is_inference() and not torch.is_inference_mode_enabled()
        return slots <= self.capacity and self.room.turn == self.turn and not recorded and not frozen

    def _filled(self, k: Tensor, v: Tensor) -> _Room:
        """Memory of sequences of one length that begin here, with room for no more; means are not yet written."""
        rows = [x.unflatten(0, (self.count, -1)).transpose(1, 2) for x in (k, v)]
        rows = [x.to(self.room.k.dtype).clone(memory_format=torch.contiguous_format) for x in rows]
        count, heads, slots, head_dim = rows[0].shape
        rows += [k.new_empty(count, heads, slots // span, head_dim) for span in self.room.spans[2:]]
        return _Room(tuple(rows), self.room.spans)

    def _copy(self, slots: int) -> _Room:
        """Memory of its own with all that this cache has, for at least `slots` slots."""
        capacity = self.capacity
        if slots > capacity:
            capacity = max(SMALLEST_CAPACITY, 2 * capacity, slots)
        return self._with(capacity)

    def _with(self, capacity: int) -> _Room:
        """The same for just so many slots."""

        def grown(x: Tensor, span: int) -> Tensor:
            y, used = x.new_zeros(*x.shape[:2], capacity // span, x.shape[3]), self.slots // span
            y[:, :, :used] = x[:, :, :used]
            return y

        return _Room(tuple(map(grown, self.room.rows, self.room.spans)), self.room.spans)
