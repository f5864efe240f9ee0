"""What may take the place of the router's scores in evaluation: beside it one sees how much is learnt.

A policy scores every token as the router does: the largest positive scores stay in the buffer, of equal ones the
earliest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megahybrid.mixers.kind import LEARNED
from megahybrid_kernels import Sequences
from megahybrid_kernels.counter_dropout import fold
from megahybrid_kernels.precision import accumulator, at_least_fp32

if TYPE_CHECKING:
    from megahybrid.mixers.lte.module import LTEAttention
    from megahybrid_kernels.lte_attention import LTECache

_QUERY_BLOCK = 256


class Policy(ABC):
    """Scores of a layer's tokens.

    Attributes:
        delay: tokens by which a score comes late where tokens come in pieces; no more than LTE's window.
    """

    delay: int = 0

    def __init__(self, layer: LTEAttention):
        self.layer = layer

    def state(self, sequences: int) -> Tensor:
        """What is known of so many sequences before their first token: `[sequences, …]`."""
        return torch.empty(sequences, 0, device=self.layer.k_proj.weight.device)

    @abstractmethod
    def scores(
        self,
        k: Tensor,
        rotated: tuple[Tensor, Tensor],
        sequences: Sequences,
        state: Tensor,
        cache: LTECache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scores of tokens, and the next state.

        Args:
            k: `[tokens, kv heads of this rank, head_dim]`, not yet rotated.
            rotated: q and k, `[tokens, heads of this rank, head_dim]`.
            sequences: the tokens' borders.
            state: after the tokens before these.
            cache: of the tokens before these, where there may be any; scores are `delay` tokens late then.

        Returns:
            `[tokens, kv heads of this rank]`, at least fp32 and contiguous: the row of position p has the score of
            position p - delay.
        """


class Recency(Policy):
    """The last tokens stay: a longer window."""

    def scores(self, k, rotated, sequences, state, cache=None):
        return _alike(sequences.positions + 1, k), state


class Random(Policy):
    """Each token's score is drawn, from its sequence's number, its position, the layer and the head alone. Its state is
    these numbers."""

    def __init__(self, layer: LTEAttention, numbers: Sequence[int]):
        """`numbers`: one of each of the sequences that begin together, of 32 bits."""
        super().__init__(layer)
        self._numbers = torch.tensor(numbers, dtype=torch.int64, device=layer.k_proj.weight.device)[:, None]

    def state(self, sequences: int) -> Tensor:
        return _of_all(self._numbers, sequences)

    def scores(self, k, rotated, sequences, state, cache=None):
        heads = self.layer.first_head + torch.arange(k.shape[1], device=k.device)
        drawn = fold(state[sequences.index], sequences.positions[:, None], self.layer.layer, heads)
        return ((drawn & 0xFFFFFF) + 1).to(accumulator(k.dtype)), state  # as many as fp32 tells apart


class KeyNorm(Policy):
    """Keys of small L2 norm stay, which get most attention (Devoto et al., arXiv 2406.11430)."""

    def scores(self, k, rotated, sequences, state, cache=None):
        return 1 / (1 + at_least_fp32(k).norm(dim=-1)), state


class AttentionMass(Policy):
    """Tokens stay that got most attention from the queries that had them in their window.

    The score is the sum of the weights that a token gets in softmaxes over windows alone, of these w + 1 queries in all
    query heads of a group. H2O (Zhang et al., arXiv 2306.14048) goes on adding for as long as a token is kept, from
    softmaxes over all that is; here what was kept before decides nothing, and a token is judged once, when it leaves
    the window. The state is what the last w tokens have got so far.
    """

    def __init__(self, layer: LTEAttention):
        super().__init__(layer)
        self.delay = layer.lte.window_size

    def state(self, sequences: int) -> Tensor:
        like = self.layer.k_proj.weight
        sizes = sequences, self.delay, self.layer.heads
        return torch.zeros(sizes, dtype=accumulator(like.dtype), device=like.device)

    def scores(self, k, rotated, sequences, state, cache=None):
        (q, k), window = rotated, self.delay
        if cache is None:
            return _mass(q, k, sequences.positions, window), state
        # The last tokens are put before the new ones of their sequence: their sums go on.
        new, borders = sequences.rows_behind(window), sequences.behind(window).cu_seqlens[:, None].long()
        slots, each = torch.arange(window, device=k.device), torch.arange(sequences.count, device=k.device)[:, None]
        old = (borders[:-1] + slots).flatten()
        starts = sequences.positions[sequences.cu_seqlens[:-1].long()][:, None]
        past = cache.k[each, :, (starts - window + slots) % cache.k.shape[2]].flatten(0, 1)
        rows = len(k) + len(old)
        queries = q.new_zeros(rows, *q.shape[1:]).index_copy(0, new, q)
        keys = k.new_zeros(rows, *k.shape[1:]).index_copy(0, new, k).index_copy(0, old, past)
        positions = torch.full((rows,), -1, device=k.device).index_copy(0, new, sequences.positions)
        mass = _mass(queries, keys, positions, window).index_add(0, old, state.flatten(0, 1))
        return mass[new - window], mass[borders[1:] - window + slots]


class Oracle(Policy):
    """Only the tokens stay that will be asked for: the ceiling of what any policy can reach. Its state is where they
    are."""

    def __init__(self, layer: LTEAttention, wanted: Sequence[Sequence[int]]):
        """`wanted`: positions, of each of the sequences that begin together."""
        super().__init__(layer)
        wanted = [sorted(each) for each in wanted]
        width = max(1, *map(len, wanted))
        # Blanks are before all positions, so that each row ascends.
        padded = [[-1] * (width - len(each)) + each for each in wanted]
        self._wanted = torch.tensor(padded, device=layer.k_proj.weight.device)

    def state(self, sequences: int) -> Tensor:
        return _of_all(self._wanted, sequences)

    def scores(self, k, rotated, sequences, state, cache=None):
        def numbered(sequence: Tensor, position: Tensor) -> Tensor:
            return (sequence << 40) + position

        wanted = numbered(torch.arange(len(state), device=k.device)[:, None], state).flatten()
        tokens = numbered(sequences.index, sequences.positions)
        place = torch.searchsorted(wanted, tokens).clamp(max=len(wanted) - 1)
        return _alike(wanted[place] == tokens, k), state


_ALIKE = {"recency": Recency, "key_norm": KeyNorm, "attention_mass": AttentionMass}


def made(layer: LTEAttention, name: str, wanted: Sequence[Sequence[int]], numbers: Sequence[int]) -> Policy | None:
    """The policy of a name for sequences that begin now, as in `Mixer.swap`; None for the router's own scores."""
    if name == LEARNED:
        return None
    if name == "random":
        return Random(layer, numbers)
    return Oracle(layer, wanted) if name == "oracle" else _ALIKE[name](layer)


def _of_all(known: Tensor, sequences: int) -> Tensor:
    if sequences != len(known):
        raise ValueError(f"the policy knows {len(known)} sequences, but {sequences} begin")
    return known


def _alike(values: Tensor, k: Tensor) -> Tensor:
    """`[tokens]` as the scores of all heads of k."""
    return values.to(accumulator(k.dtype))[:, None].expand(k.shape[:2]).contiguous()


def _mass(q: Tensor, k: Tensor, positions: Tensor, window: int) -> Tensor:
    """`[rows, kv heads]`, at least fp32: the sum of each key's weights in softmaxes over the w + 1 keys of a window.

    positions: int64 `[rows]`; a query sees its own row's key and as many before it as its position says, at most
    `window`; at -1 it sees none.
    """
    rows, heads, head_dim = k.shape
    q, k = at_least_fp32(q).unflatten(1, (heads, -1)) * head_dim**-0.5, at_least_fp32(k)
    mass = k.new_zeros(rows, heads)
    for first in range(0, rows, _QUERY_BLOCK):
        some = slice(first, min(first + _QUERY_BLOCK, rows))
        seen = slice(max(0, first - window), some.stop)
        row, column = (torch.arange(each.start, each.stop, device=k.device) for each in (some, seen))
        apart = row[:, None] - column
        visible = (apart >= 0) & (apart <= positions[some, None].clamp(max=window))
        logits = torch.einsum("qhgd,khd->hgqk", q[some], k[seen]).masked_fill(~visible, -torch.inf)
        weights = logits.softmax(-1).masked_fill(~visible, 0)  # a query without a key has none
        mass[seen] += weights.sum((1, 2)).T
    return mass
