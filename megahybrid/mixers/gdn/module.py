"""The module of Gated DeltaNet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megahybrid.config.schema import ModelConfig
from megahybrid.model.context import Context
from megahybrid.model.mixer import Fallback, Mixer
from megahybrid.model.settings import Settings
from megahybrid.parallel import tokens
from megahybrid.parallel.heads import flat_to_heads, own_heads, to_tokens
from megahybrid.parallel.joined import together
from megahybrid.parallel.layers import ColumnLinear, RowLinear, project, shared
from megahybrid.parallel.parameters import Initializer, constant, parameter, uniform
from megahybrid_kernels import Sequences
from megahybrid_kernels.causal_conv1d import causal_conv1d
from megahybrid_kernels.gated_delta_rule import gated_delta_rule, unsupported
from megahybrid_kernels.gemv import gated_rms_norm_gemv
from megahybrid_kernels.norm import gated_rms_norm


class GDNState(NamedTuple):
    """What a Gated DeltaNet layer remembers of each sequence.

    Attributes:
        recurrent: `[sequences, heads, head_dim, value_head_dim]`, at least fp32.
        rows: `[sequences, conv_size - 1, channels of q, k and v]`, the short convolutions' last inputs.
    """

    recurrent: Tensor
    rows: Tensor


class GatedDeltaNet(Mixer):
    """Gated delta rule on short-convolved q, k, v, with an output gate; heads split over tensor parallel ranks.

    Context parallel ranks exchange tokens for heads between projections and gate, or pass on rows and memories.
    """

    beside = "q_conv", "k_conv", "v_conv"  # see `parallel.joined`
    only_projects = True

    def __init__(self, settings: Settings, layer: int):
        super().__init__(settings, layer)
        config = settings.model.gdn
        self.key_dim, self.value_dim = config.head_dim, config.value_head_dim
        hidden, heads, taps = settings.model.hidden_size, config.num_heads, config.conv_size
        keys, values = heads * self.key_dim, heads * self.value_dim
        project = settings.projection
        self.q_proj = ColumnLinear(hidden, keys, project)
        self.k_proj = ColumnLinear(hidden, keys, project)
        self.v_proj = ColumnLinear(hidden, values, project)
        self.g_proj = ColumnLinear(hidden, values, project)
        self.a_proj = ColumnLinear(hidden, heads, project)
        self.b_proj = ColumnLinear(hidden, heads, project)
        conv = uniform(-(taps**-0.5), taps**-0.5)
        self.q_conv = parameter(keys, taps, axis=0, initializer=conv)
        self.k_conv = parameter(keys, taps, axis=0, initializer=conv)
        self.v_conv = parameter(values, taps, axis=0, initializer=conv)
        self.A_log = parameter(heads, axis=0, initializer=_log_of_uniform(1e-4, 16), weight_decay=False)
        steps = _inverse_softplus_of_log_uniform(1e-3, 1e-1)
        self.dt_bias = parameter(heads, axis=0, initializer=steps, weight_decay=False)
        self.norm = parameter(self.value_dim, initializer=constant(1.0), weight_decay=False, partial=True)
        self.o_proj = RowLinear(values, hidden, settings.output_projection, settings.sequence_parallel)

    def forward(self, x: Tensor, context: Context, state: GDNState | None = None):
        projections = self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.a_proj, self.b_proj
        *qkv, gate, a, b = project(x, projections, self.settings.sequence_parallel)
        if self.keeps_tokens:
            o, state = self._own_tokens(*qkv, a, b, context.sequences), None
        else:
            parts = flat_to_heads(len(self.A_log), *qkv, a, b)
            o, state = self._own_heads(*parts, context, state)
            o = to_tokens(o)
        gate, eps = gate.unflatten(-1, (-1, self.value_dim)), self.settings.model.norm_eps
        if self.o_proj.takes_gemv(o, self.value_dim):
            y = gated_rms_norm_gemv(o, gate, self.norm, eps, self.o_proj.weight, ahead=True)
            return y.unsqueeze(1), None, state
        o = gated_rms_norm(o, gate, shared(self.norm), eps)
        return self.o_proj(o.flatten(-2)), None, state

    def _own_tokens(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, sequences: Sequences) -> Tensor:
        own, before = tokens.own(sequences), self.q_conv.shape[1] - 1
        parts = tokens.borrow(tokens.rows_around(sequences, before), q, k, v)
        q, k, v = (
            causal_conv1d(part.own, conv, own, _begun(part.before, before, own.count), output_final_state=False)[0]
            for part, conv in zip(parts, (self.q_conv, self.k_conv, self.v_conv), strict=True)
        )
        return self._rule(
            (q, k, v, a, b, self.A_log, self.dt_bias), own, output_final_state=False, border=tokens.border(sequences)
        )[0]

    def _own_heads(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, context: Context, state: GDNState | None
    ) -> tuple[Tensor, GDNState | None]:
        qkv, sequences, (memory, rows) = (q, k, v), context.sequences, state or (None, None)
        # Training never reads the state after a document's end.
        going_on = state is not None or context.keep_states
        options = {"output_final_state": going_on, "in_place": context.in_place}
        convs = self.q_conv, self.k_conv, self.v_conv
        if going_on:
            y, rows = causal_conv1d(together(qkv, 1), together(convs, 0), sequences, rows, **options)
            q, k, v = y.split_with_sizes([len(conv) for conv in convs], 1)
        else:
            pairs = zip(qkv, map(own_heads, convs), strict=True)
            q, k, v = (causal_conv1d(y, conv, sequences, output_final_state=False)[0] for y, conv in pairs)
        gates = a, b, own_heads(self.A_log), own_heads(self.dt_bias)
        o, memory = self._rule((q, k, v, *gates), sequences, initial_state=memory, **options)
        return o, GDNState(memory, rows) if going_on else None

    def _rule(self, inputs: Sequence[Tensor], sequences: Sequences, **options) -> tuple[Tensor, Tensor | None]:
        q, k, v, *gates = inputs
        q, k = (x.unflatten(-1, (-1, self.key_dim)) for x in (q, k))
        return gated_delta_rule(q, k, v.unflatten(-1, (-1, self.value_dim)), *gates, sequences, **options)

    def initial_state(self, sequences: int) -> GDNState:
        like, taps = self.q_conv, self.q_conv.shape[1]
        heads = self.A_log.shape[0]
        at_least_fp32 = torch.promote_types(like.dtype, torch.float32)
        recurrent = like.new_zeros(sequences, heads, self.key_dim, self.value_dim, dtype=at_least_fp32)
        channels = sum(map(len, (self.q_conv, self.k_conv, self.v_conv)))
        return GDNState(recurrent, like.new_zeros(sequences, taps - 1, channels))

    @classmethod
    def fallbacks(cls, model: ModelConfig, dtype: torch.dtype) -> Iterator[Fallback]:
        dims = model.gdn.head_dim, model.gdn.value_head_dim
        if reason := unsupported(dtype, *dims):
            wider = "head_dim" if dims[0] >= dims[1] else "value_head_dim"
            yield Fallback("gated_delta_rule", reason, f"model.gdn.{wider}")


def _begun(rows: Tensor, before: int, count: int) -> Tensor | None:
    """`[count, before, channels]`: the last inputs before each sequence, of which the first has `rows`, if any."""
    if len(rows) == 0:
        return None
    blank = rows.new_zeros(count * before - len(rows), rows.shape[1])
    first = torch.cat([blank[: before - len(rows)], rows, blank[before - len(rows) :]])
    return first.unflatten(0, (count, before))


def _log_of_uniform(low: float, high: float) -> Initializer:
    """log U(low, high)."""
    draw = uniform(low, high)
    return lambda shape, generator: draw(shape, generator).log()


def _inverse_softplus_of_log_uniform(low: float, high: float) -> Initializer:
    """softplus⁻¹(dt) with dt log-uniform in [low, high]."""
    draw = uniform(math.log(low), math.log(high))

    def make(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        step = draw(shape, generator).exp()
        return step + torch.log(-torch.expm1(-step))

    return make
