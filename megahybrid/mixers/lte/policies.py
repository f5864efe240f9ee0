"""What may take the place of the router's scores in evaluation: beside it one sees how much is learnt.

A policy scores every token as the router does: the largest positive scores stay in the buffer, of equal ones the
earliest. It sees no more of a text than the router has seen when its score is due.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from megahybrid_kernels.counter_dropout import fold
from megahybrid_kernels.precision import at_least_fp32

if TYPE_CHECKING:
    from megahybrid_kernels.lte_attention import LTECache

LEARNED = "learned"
"""The router's own scores."""


class Scored(NamedTuple):
    """The tokens whose scores are due in a pass, one a row; rows whose position is negative have none.

    Attributes:
        sequence: int64 `[tokens]`, whose they are.
        position: int64 `[tokens]`, in it.
        norms: at least fp32 `[tokens, heads of this rank]`, of their keys.
        first_head: number of the first head, over all layers and ranks.
        state: what `Policy.state` has given.
    """

    sequence: Tensor
    position: Tensor
    norms: Tensor
    first_head: int
    state: Tensor


class Policy(ABC):
    """Scores of a layer's tokens."""

    def state(self, sequences: int) -> Tensor:
        """What is known of so many new sequences: `[sequences, any]`, on the CPU."""
        return torch.empty(sequences, 0, dtype=torch.int64)

    @abstractmethod
    def scores(self, tokens: Scored) -> Tensor:
        """`[tokens, heads of this rank]`, of `norms`' dtype."""


class Recency(Policy):
    """The last tokens stay: a longer window."""

    def scores(self, tokens: Scored) -> Tensor:
        return (tokens.position + 1).to(tokens.norms)[:, None].expand_as(tokens.norms)


class Random(Policy):
    """Each token's score is drawn, from its position and head alone."""

    def scores(self, tokens: Scored) -> Tensor:
        heads = tokens.first_head + torch.arange(tokens.norms.shape[1], device=tokens.position.device)
        return ((fold(tokens.position[:, None], heads) & 0xFFFFFF) + 1).to(tokens.norms) / 2**24


class KeyNorm(Policy):
    """Keys of small norm stay, which get most attention (Devoto et al., arXiv 2406.11430)."""

    def scores(self, tokens: Scored) -> Tensor:
        return 1 / (1 + tokens.norms)


class Oracle(Policy):
    """Only the tokens stay that will be asked for: the ceiling of what any policy can reach."""

    def __init__(self, wanted: Sequence[Sequence[int]]):
        """`wanted`: positions, of each of the sequences that begin together."""
        self._wanted = wanted

    def state(self, sequences: int) -> Tensor:
        wanted = torch.full((sequences, max(1, *map(len, self._wanted))), -1)
        for row, positions in zip(wanted, self._wanted, strict=True):
            row[: len(positions)] = torch.tensor(positions, dtype=torch.int64)
        return wanted

    def scores(self, tokens: Scored) -> Tensor:
        def numbered(sequence: Tensor, position: Tensor) -> Tensor:
            return (sequence << 40) + position

        rows = torch.arange(len(tokens.state), device=tokens.state.device)[:, None]
        wanted = numbered(rows, tokens.state)[tokens.state >= 0]
        found = torch.isin(numbered(tokens.sequence, tokens.position), wanted)
        return found.to(tokens.norms)[:, None].expand_as(tokens.norms)


_BLIND = {"recency": Recency, "random": Random, "key_norm": KeyNorm}

POLICIES = (LEARNED, *_BLIND, "oracle")
"""Names of all."""


@contextlib.contextmanager
def swapped(model: nn.Module, name: str, wanted: Sequence[Sequence[int]]) -> Iterator[None]:
    """A model whose LTE layers keep tokens by the policy of this name, for sequences that begin now."""
    from megahybrid.mixers.lte.module import LTEAttention

    policy = None
    if name != LEARNED:
        policy = Oracle(wanted) if name == "oracle" else _BLIND[name]()
    layers = [module for module in model.modules() if isinstance(module, LTEAttention)]
    for layer in layers:
        layer.policy = policy
    try:
        yield
    finally:
        for layer in layers:
            layer.policy = None


def due(
    k: Tensor, cache: LTECache | None, sequence: Tensor, position: Tensor, delay: int, first_head: int, state: Tensor
) -> Scored:
    """The tokens whose scores are due with new keys.

    Args:
        k: `[tokens, heads of this rank, head_dim]`, new.
        cache: of the tokens before them, if there are any.
        sequence, position: int64 `[tokens]`, of the new tokens.
        delay: by how many tokens scores are late.
        first_head, state: see `Scored`.
    """
    position, row = position - delay, torch.arange(len(k), device=k.device) - delay
    norms = at_least_fp32(k).norm(dim=-1)
    here = (row >= 0) & (sequence[row.clamp(min=0)] == sequence)
    found = norms[row.clamp(min=0)]
    if cache is not None:
        old = at_least_fp32(cache.k[sequence, :, position % cache.k.shape[2]]).norm(dim=-1)
        found = torch.where(here[:, None], found, old)
    return Scored(sequence, position, found, first_head, state)
