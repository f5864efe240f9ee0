"""The module of Gated DeltaNet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megahybrid.config.schema import ModelConfig
from megahybrid.model.context import Context
from megahybrid.model.mixer import Fallback, Mixer
from megahybrid.model.settings import Settings
from megahybrid.parallel.heads import own_heads, to_heads, to_tokens
from megahybrid.parallel.layers import ColumnLinear, RowLinear, project, shared
from megahybrid.parallel.parameters import Initializer, constant, parameter, uniform
from megahybrid_kernels.causal_conv1d import causal_conv1d
from megahybrid_kernels.gated_delta_rule import gated_delta_rule, unsupported
from megahybrid_kernels.norm import gated_rms_norm


class GDNState(NamedTuple):
    """What a Gated DeltaNet layer remembers of each sequence.

    Attributes:
        recurrent: `[sequences, heads, head_dim, value_head_dim]`, at least fp32.
        q, k, v: `[sequences, conv_size - 1, channels]`, the short convolutions' last inputs.
    """

    recurrent: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class GatedDeltaNet(Mixer):
    """Gated delta rule on short-convolved q, k, v, with an output gate; heads split over tensor parallel ranks, and
    between projections and gate over context parallel ones."""

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
        sequences, before = context.sequences, state or (None, None, None, None)
        # Training never reads the state after a document's end.
        options = {"output_final_state": state is not None, "in_place": context.in_place}
        projections = self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.a_proj, self.b_proj
        q, k, v, gate, a, b = project(x, projections, self.settings.sequence_parallel)
        heads = [y.unflatten(-1, (len(self.A_log), -1)) for y in (q, k, v, a, b)]
        q, k, v, a, b = (y.flatten(1) for y in to_heads(*heads))
        q_conv, k_conv, v_conv, A_log, dt_bias = map(
            own_heads, (self.q_conv, self.k_conv, self.v_conv, self.A_log, self.dt_bias)
        )
        q, q_rows = causal_conv1d(q, q_conv, sequences, before[1], **options)
        k, k_rows = causal_conv1d(k, k_conv, sequences, before[2], **options)
        v, v_rows = causal_conv1d(v, v_conv, sequences, before[3], **options)
        o, recurrent = gated_delta_rule(
            q.unflatten(-1, (-1, self.key_dim)),
            k.unflatten(-1, (-1, self.key_dim)),
            v.unflatten(-1, (-1, self.value_dim)),
            a,
            b,
            A_log,
            dt_bias,
            sequences,
            before[0],
            **options,
        )
        gate = gate.unflatten(-1, (-1, self.value_dim))
        o = gated_rms_norm(to_tokens(o), gate, shared(self.norm), self.settings.model.norm_eps)
        y = self.o_proj(o.flatten(-2))
        return y, None, None if state is None else GDNState(recurrent, q_rows, k_rows, v_rows)

    def initial_state(self, sequences: int) -> GDNState:
        like, taps = self.q_conv, self.q_conv.shape[1]
        heads = self.A_log.shape[0]
        at_least_fp32 = torch.promote_types(like.dtype, torch.float32)
        recurrent = like.new_zeros(sequences, heads, self.key_dim, self.value_dim, dtype=at_least_fp32)
        rows = [like.new_zeros(sequences, taps - 1, conv.shape[0]) for conv in (self.q_conv, self.k_conv, self.v_conv)]
        return GDNState(recurrent, *rows)

    @classmethod
    def fallbacks(cls, model: ModelConfig, dtype: torch.dtype) -> Iterator[Fallback]:
        dims = model.gdn.head_dim, model.gdn.value_head_dim
        if reason := unsupported(dtype, *dims):
            wider = "head_dim" if dims[0] >= dims[1] else "value_head_dim"
            yield Fallback("gated_delta_rule", reason, f"model.gdn.{wider}")


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
