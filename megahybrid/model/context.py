"""What every layer of one micro-batch reads beside its input, and what it gives back beside its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from megahybrid_kernels import Sequences


class Watch(NamedTuple):
    """Queries and keys of which it is asked, in a pass without states and gradients, whether the one sees the other.

    Attributes:
        queries, keys: int64 `[pairs]`, places in the micro-batch.
    """

    queries: Tensor
    keys: Tensor

    def distances(self, sequences: Sequences) -> Tensor:
        """int64 `[pairs]`: how many tokens a key stands before its query; negative where no query could see it, since
        it comes later or is another document's."""
        apart = sequences.index[self.queries] != sequences.index[self.keys]
        return (self.queries - self.keys).masked_fill(apart, -1)


@dataclass
class Decision:
    """What a layer chooses in a forward pass without a gradient, as the blocks that queries attend to.

    Where activations are recomputed the second pass takes over what the first one chose: inputs that were rounded
    otherwise could have it choose otherwise, and the gradient would be another function's.

    Attributes:
        taken: of the first pass; None before.
    """

    taken: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """One micro-batch, as every layer sees it: of all tokens, of which a context parallel rank has a part.

    Attributes:
        sequences: the documents' borders.
        dropout_keys: int64 `[layers, tokens]`, as of `megahybrid_kernels.dropout_keys`; None switches
            dropout off.
        aux_scale: weight of the auxiliary loss beside the micro-batch's loss: 1 / micro-batches of the step, times the
            number of context parallel ranks, over which ZeRO takes the mean.
        keep_states: whether mixers that are given no state, since all sequences begin here, return the next one.
        in_place: whether mixers may overwrite the states they are given, as they may when nobody needs those again.
        watch: of what mixers that attend say whether it is seen; not with states, and not in training.
        whole: whether no layer may leave out what it has no room for, since in this step's first passes one did.
        decision: of the one layer that gets this context, which recomputes its activations; None in all others'.
    """

    sequences: Sequences
    dropout_keys: Tensor | None = None
    aux_scale: float = 1.0
    keep_states: bool = False
    in_place: bool = False
    watch: Watch | None = None
    whole: bool = False
    decision: Decision | None = None

    @property
    def training(self) -> bool:
        """Whether dropout and training's own visibility rule apply."""
        return self.dropout_keys is not None


class Aux(NamedTuple):
    """What a layer gives beside its output: in training for its kind's regulator (regulation.py), else to a `Watch`.

    Attributes:
        loss: scalar, this rank's part of the auxiliary loss: the sum over tensor and context parallel ranks is the
            whole.
        counts: int64, what the regulator declares, by name, but for zeros; of a count that is split this rank's part,
            or of context parallel ranks that keep their tokens, theirs of its heads' part.
        seen: bool `[pairs, heads of this rank]`, with key-value heads: whether the query of each watched pair sees the
            key. Of ranks that share a head, one says so.
    """

    loss: Tensor | None = None
    counts: Mapping[str, Tensor] = MappingProxyType({})
    seen: Tensor | None = None
