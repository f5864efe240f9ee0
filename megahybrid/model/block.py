"""One layer: mixer and SwiGLU, each on a normalised input and added to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megahybrid.mixers import KINDS
from megahybrid.model.context import Aux, Context
from megahybrid.model.loss import attach_loss
from megahybrid.model.settings import Settings
from megahybrid.parallel.layers import ColumnLinear, NormOfARow, RowLinear, project, shared
from megahybrid.parallel.parameters import constant, parameter
from megahybrid_kernels.gemv import swiglu_gemv, takes_gemv
from megahybrid_kernels.norm import add_rms_norm, rms_norm
from megahybrid_kernels.swiglu import swiglu


class RMSNorm(nn.Module):
    """Root mean square normalisation over the hidden dimension, `[…, hidden]` → the same."""

    def __init__(self, settings: Settings):
        super().__init__()
        partial = settings.sequence_parallel
        self.weight = parameter(
            settings.model.hidden_size, initializer=constant(1.0), weight_decay=False, partial=partial
        )
        self.settings = settings

    def forward(self, x: Tensor, addend: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of the residual stream and the stream, which an addend first goes into."""
        weight = shared(self.weight)
        if addend is None:
            return rms_norm(x, weight, self.settings.model.norm_eps), x
        return add_rms_norm(addend, x, weight, self.settings.model.norm_eps)

    def before_product(self, x: Tensor, addend: Tensor | None) -> tuple[Tensor | NormOfARow, Tensor]:
        """The same for `project` alone, which may make the norm of a single token itself; the stream is whole then."""
        eps = self.settings.model.norm_eps
        if torch.is_grad_enabled() or not takes_gemv(x, self.weight.unsqueeze(0)):
            return self(x, addend)
        if addend is None:
            return NormOfARow(x, None, None, self.weight, eps), x
        total = torch.empty_like(x)
        return NormOfARow(addend, x, total, self.weight, eps), total


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), the width inside split over tensor parallel ranks."""

    def __init__(self, settings: Settings):
        super().__init__()
        hidden, inner = settings.model.hidden_size, settings.model.intermediate_size
        self.settings = settings
        self.gate_proj = ColumnLinear(hidden, inner, settings.projection)
        self.up_proj = ColumnLinear(hidden, inner, settings.projection)
        self.down_proj = RowLinear(inner, hidden, settings.output_projection, settings.sequence_parallel)

    def forward(self, x: Tensor | NormOfARow) -> Tensor:
        gate, up = project(x, (self.gate_proj, self.up_proj), self.settings.sequence_parallel)
        if self.down_proj.takes_gemv(gate):
            return swiglu_gemv(gate, up, self.down_proj.weight, ahead=True).unsqueeze(1)
        return self.down_proj(swiglu(gate, up))


class Block(nn.Module):
    """x ← x + mixer(norm(x)); x ← x + SwiGLU(norm(x)). The next norm, which reads the sum, does the last addition."""

    def __init__(self, settings: Settings, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(settings)
        self.mixer = KINDS[settings.pattern.letters[layer]].module()(settings, layer)
        self.mlp_norm = RMSNorm(settings)
        self.mlp = SwiGLU(settings)

    def forward(
        self, x: Tensor, addend: Tensor | None, context: Context, state: Any = None
    ) -> tuple[Tensor, Tensor, Aux | None, Any]:
        """`[tokens, 1, hidden]` and what is still to be added to it → (both, by-products, next state of the mixer)."""
        norm = self.mixer_norm.before_product if self.mixer.only_projects else self.mixer_norm
        normalised, x = norm(x, addend)
        y, aux, state = self.mixer(normalised, context, state)
        if aux is not None and aux.loss is not None:
            y = attach_loss(y, aux.loss, context.aux_scale)
        normalised, x = self.mlp_norm.before_product(x, y)
        return x, self.mlp(normalised), aux, state
