"""Sliding window attention with learnable token eviction, LTE (He & Garner, arXiv 2510.20787)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from megahybrid.errors import UserError
from megahybrid.key import key
from megahybrid.mixers.attention import AttentionKind

if TYPE_CHECKING:
    from megahybrid.config.schema import ModelConfig

CONVOLUTIONS = 3
"""Of the router, one after the other."""


@dataclass
class RetentionLossConfig:
    """The L1 term on retention scores and the controller of its weight lambda (method: multiplicative, per head)."""

    update_interval: int = key(32, may_change=True, at_least=2)
    """Optimizer steps between two updates of lambda; its moving average spans half of them."""
    initial: float = key(1e-9, may_change=True)
    """First non-zero lambda; a lambda that would fall below it becomes 0."""
    maximum: float = key(1.0, may_change=True)
    """Largest lambda."""
    increase: float = key(1.5, may_change=True, above=1)
    """Factor on lambda while more tokens are kept than the buffer holds."""
    decrease: float = key(2.0, may_change=True, above=1)
    """Divisor of lambda while fewer are kept than tolerance * buffer_size."""
    tolerance: float = key(0.95, may_change=True, below=1)
    """Lambda rests while the kept count is between tolerance * buffer_size and buffer_size."""


@dataclass
class LTEConfig:
    """Sliding window attention with learnable token eviction (L); its heads are model.attention's."""

    window_size: int = key(768)
    """w: a query sees itself and the w tokens before it; older ones only if retained."""
    buffer_size: int = key(512)
    """b: retained tokens a head holds outside the window, sinks included; the target of the controller in training."""
    sink_size: int = key(4, at_least=0)
    """The first tokens of a document, always retained."""
    conv_size: int = key(3)
    """Taps of each of the router's three convolutions (odd)."""
    conv_dilation: int = key(2)
    """Dilation of the router's convolutions."""
    dropout: float = key(0.1, may_change=True, at_least=0, below=1)
    """Dropout before each of the router's convolutions, in training."""
    train_cap: bool = key(False, may_change=True)
    """Train with the buffer's capacity enforced, as in inference, instead of leaving it to the L1 term alone."""
    loss: RetentionLossConfig = field(default_factory=RetentionLossConfig)
    """The L1 term and its controller."""

    @property
    def margin(self) -> int:
        """Tokens on either side that the router looks at for a token's score."""
        return CONVOLUTIONS * (self.conv_size // 2) * self.conv_dilation


class LTEKind(AttentionKind):
    """Sliding window attention with learnable token eviction."""

    letter = "L"
    title = "LTE"
    sections: ClassVar = {**AttentionKind.sections, "lte": LTEConfig}

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        lte = model.lte
        if lte.conv_size % 2 == 0:
            raise UserError(
                f"model.lte.conv_size is {lte.conv_size}; the router's convolutions are centred: use odd taps."
            )
        if lte.window_size <= lte.margin:
            raise UserError(
                f"model.lte.window_size ({lte.window_size}) must be larger than the router's margin ({lte.margin}), "
                "or a token would leave the window before its score is final."
            )
        if lte.buffer_size < lte.sink_size:
            raise UserError(
                f"model.lte.buffer_size ({lte.buffer_size}) must hold the sinks (model.lte.sink_size = "
                f"{lte.sink_size})."
            )
        if model.attention.head_dim % 4:
            raise UserError("model.attention.head_dim must be a multiple of 4, since the router halves its channels.")
