"""The module of the gated causal mean, and what regulates its gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megahybrid.config.schema import Config
from megahybrid.key import derived
from megahybrid.model.context import Aux, Context
from megahybrid.model.mixer import Mixer
from megahybrid.model.regulation import Count, Quantity
from megahybrid.model.settings import Settings
from megahybrid.parallel import groups
from megahybrid.parallel.heads import own_heads, to_heads, to_tokens
from megahybrid.parallel.layers import ColumnLinear, RowLinear, project
from megahybrid.parallel.parameters import constant, parameter

OPEN, GOAL = 0.73, 0.4
"""From which mean over its channels on a gate counts as open, and the part of tokens for which it should be."""


class MeanState(NamedTuple):
    """Sums of the values so far, `[sequences, heads, head_dim]`, at least fp32."""

    total: Tensor


class GatedMean(Mixer):
    """o_t = sigmoid(g_t + bias) · mean of v_1 … v_t in the token's document; heads split over tensor and context
    parallel ranks.

    `weight`, `[heads of this rank]`, weighs the auxiliary loss.
    """

    def __init__(self, settings: Settings, layer: int):
        super().__init__(settings, layer)
        hidden, mean = settings.model.hidden_size, settings.model.mean
        self.heads, self.head_dim = mean.num_heads, mean.head_dim
        self.v_proj = ColumnLinear(hidden, mean.num_heads * mean.head_dim, settings.projection)
        self.g_proj = ColumnLinear(hidden, mean.num_heads * mean.head_dim, settings.projection)
        self.bias = parameter(mean.num_heads, mean.head_dim, axis=0, initializer=constant(1.0), weight_decay=False)
        self.o_proj = RowLinear(
            mean.num_heads * mean.head_dim, hidden, settings.output_projection, settings.sequence_parallel
        )
        self.weight = torch.zeros(len(self.bias))

    def forward(self, x: Tensor, context: Context, state: MeanState | None = None):
        projected = project(x, (self.v_proj, self.g_proj), self.settings.sequence_parallel)
        v, g = to_heads(*(y.unflatten(-1, (-1, self.head_dim)) for y in projected))
        values = v.to(torch.promote_types(v.dtype, torch.float32)).split(list(context.sequences.lengths))
        sums = [each.cumsum(0) for each in values]
        state = self.begun(state, context)
        if state is not None:
            sums = [each + before for each, before in zip(sums, state.total, strict=True)]
            state = MeanState(torch.stack([each[-1] for each in sums]))
        mean = torch.cat(sums) / (context.sequences.positions + 1)[:, None, None]
        gate = torch.sigmoid(g + own_heads(self.bias))
        aux = self._aux(gate.mean(-1)) if context.training else None
        return self.o_proj(to_tokens(gate * mean.to(v.dtype)).flatten(-2)), aux, state

    def _aux(self, gates: Tensor) -> Aux:
        """The mean square of the heads' gates `[tokens, heads]`, each head's times its weight."""
        loss = torch.dot(self.weight.to(gates), gates.square().mean(0)) / self.heads
        return Aux(loss, {"open": (gates > OPEN).sum(0), "tokens": torch.tensor(len(gates))})

    def initial_state(self, sequences: int) -> MeanState:
        dtype = torch.promote_types(self.bias.dtype, torch.float32)
        return MeanState(self.bias.new_zeros(sequences, *self.bias.shape, dtype=dtype))


class GateRegulator:
    """A head's weight grows while its gate is open for more tokens than it should be, else it shrinks."""

    name, member = "gate", "head"

    def __init__(self, layers: Sequence[int], heads: int, length: int, device: torch.device):
        self.layers, self.length = layers, length
        self.counts = {"open": Count(heads, split=True), "tokens": Count(1, split=False)}
        self.weight = torch.zeros(len(layers), heads, device=device)
        self.open = torch.zeros_like(self.weight)

    @classmethod
    def of(cls, config: Config, layers: Sequence[int], device: torch.device) -> GateRegulator:
        return cls(layers, derived(config.model).mean.num_heads, config.train.seq_length, device)

    @staticmethod
    def quantities(config: Config) -> tuple[Quantity, ...]:
        goal = GOAL * config.train.seq_length
        return Quantity("open", "open gates a sequence", target=("goal", goal)), Quantity("gate_weight", "weight", True)

    def attach(self, layer: int, mixer: GatedMean) -> None:
        rank, size = groups.head_parallel()
        mixer.weight = self.weight[self.layers.index(layer)].chunk(size)[rank]

    def update(self, step: int, counts: Mapping[str, Tensor] | None, longest: int) -> None:
        if counts is not None:
            self.open = (self.length * counts["open"] / counts["tokens"]).to(self.weight)
            self.weight += torch.where(self.open > GOAL * self.length, 0.25, -0.125)

    def metrics(self) -> dict[str, Tensor]:
        return {"open": self.open, "gate_weight": self.weight}

    def state(self) -> dict[str, list]:
        return {"weight": self.weight.tolist()}

    def load_state(self, state: dict[str, list]) -> None:
        self.weight.copy_(torch.tensor(state["weight"]))
