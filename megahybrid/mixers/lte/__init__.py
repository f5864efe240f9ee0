"""Sliding window attention with learnable token eviction, LTE (He & Garner, arXiv 2510.20787)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from megahybrid.errors import UserError
from megahybrid.key import key
from megahybrid.mixers.attention import AttentionKind, judged_heads, rank_heads, unnormalised, widths
from megahybrid.mixers.counting import mean_of_min
from megahybrid.mixers.kind import Activations, MicroBatch

if TYPE_CHECKING:
    from megahybrid.config.schema import ModelConfig
    from megahybrid.model.mixer import Mixer
    from megahybrid.model.regulation import Regulator
    from megahybrid_kernels.judging.case import Shape

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
    gate: str = key("value", may_change=True, choices=("value", "logit", "counterfactual", "displacing"))
    """Whose gradient a retention score gets, since the mask has none. value: that of a gate on the token's value, as in
    the paper (equation 6); logit: that of a gate on its logits, which adds up to 0 over what a query sees;
    counterfactual: as logit, and what it would change for every query that does not see the token to see it, too, for
    the FLOPs of full attention's forward pass; heads live that die with the others (docs/evidence.md, E2d); displacing:
    as counterfactual, less what raises all scores of a full buffer in common, so that none comes to keep everything
    (docs/evidence.md, E10); needs train_cap."""
    routing_grad: bool = key(True, may_change=True)
    """Whether what scores get goes on to the keys and values that the router reads, as in the paper."""
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
    utilisation = 0.370, 0.485
    launches = 69
    sections: ClassVar = {**AttentionKind.sections, "lte": LTEConfig}
    parts = ("router",)
    policies = ("recency", "random", "key_norm", "attention_mass", "oracle")

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
        if lte.gate == "displacing" and not lte.train_cap:
            raise UserError(
                "model.lte.gate is displacing, which is about a full buffer, but training has none without "
                "model.lte.train_cap: set that to true, or the gate to counterfactual."
            )
        if model.attention.head_dim % 4:
            raise UserError("model.attention.head_dim must be a multiple of 4, since the router halves its channels.")

    def split(self, model: ModelConfig) -> dict[str, int]:
        """A KV head's router is one rank's."""
        heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
        return {f"model.attention.{'num_heads' if heads == kv_heads else 'num_kv_heads'}": kv_heads}

    def passed_on(self, model: ModelConfig, ranks: int, width: int) -> float | None:
        """Keys and values before a rank's tokens that the window and one rank's room for retained tokens hold, those
        around them that the router sees, and of every other rank what it has room for, for those whose document
        begins farther back, with two numbers of 4 bytes each. Where heads are too few to be exchanged, in some steps
        instead all keys and values of the ranks before. None where scores' gradients need all tokens."""
        lte, heads, head_dim = model.lte, model.attention.num_kv_heads, model.attention.head_dim
        if lte.gate in ("counterfactual", "displacing"):
            return None
        keys, given = 2 * width * head_dim, most_room(lte)
        around, retained = lte.window_size + given + 2 * lte.margin, (ranks - 1) * given
        return heads * (around * keys + retained * (keys + 8))

    def exchanges_at_times(self, model: ModelConfig, ranks: int) -> bool:
        """Without a capped buffer, where a head retains more than a rank makes room for."""
        return not model.lte.train_cap and self.heads_fault(model, ranks) is None

    def keys(self, model: ModelConfig, length: int) -> float:
        """The query at position i sees min(i + 1, w + 1) keys in its window. Of the max(0, i - w) tokens that left it
        it sees at most buffer_size, as in inference: in training, too, this is what the controller of lambda steers to.
        Before the controller has settled a model without train_cap sees more, up to all. What the gates
        counterfactual and displacing take, as much as attention to all in a forward pass, is not counted.
        """
        window, buffer = model.lte.window_size, model.lte.buffer_size
        left = max(0, length - 1 - window)
        return mean_of_min(length, window + 1) + (mean_of_min(left, buffer) * left / length if left else 0)

    def window(self, model: ModelConfig) -> float:
        return model.lte.window_size + 1

    def chooses_after(self, model: ModelConfig) -> int:
        return self.window(model)

    def close_limits(self, model: ModelConfig) -> dict[str, dict[str, int]]:
        sinks = model.lte.sink_size
        return {"lte": {"window_size": model.lte.margin + 10, "buffer_size": sinks + 8, "sink_size": sinks}}

    def flops(self, model: ModelConfig, length: int) -> dict[str, float]:
        """Those of attention; and of the router, a KV head: convolutions with 2 taps c_in c_out each, and a projection
        to one logit."""
        channels, taps = router_channels(model.attention.head_dim), model.lte.conv_size
        a_head = sum(2 * taps * fan_in * out for fan_in, out in itertools.pairwise(channels)) + 2 * channels[-1]
        return super().flops(model, length) | {"router": model.attention.num_kv_heads * a_head}

    def activations(self, model: ModelConfig, batch: MicroBatch) -> Activations:
        """With w bytes an activation, queries of width Q and keys of width K on a rank: q and o, 2 w Q, and exchanged
        o, w Q; k before and after rotation, and v, 3 w K; and the outputs of the router's convolutions, 7/4 w K. A rank
        that keeps its tokens joins k and v to a window before them and to what the router sees, and once more, with q
        and o, to a buffer, or without a cap to what all ranks have room for; where heads are too few to be exchanged,
        at first, in place of both, to all before.
        Backward: gradients of q and o, 2 w Q, of k and v, 2 w K, and those of far columns in fp32, 8 K. (In PyTorch
        the gates counterfactual and displacing take more, with the square of the longest document.)
        """
        queries, keys = widths(model.attention, batch)
        head_dim, width = model.attention.head_dim, batch.width
        routers = sum(router_channels(head_dim)[1:]) / head_dim
        saved, more = (2 + batch.exchanged) * queries + (3 + routers) * keys, 1.0
        if batch.rows > 1:
            before, scored = (1 + rows / (batch.samples * batch.length) for rows in self._rows_around(model, batch))
            more, joined = before, 1 if before == scored else 2
            saved = more * (2 * queries + joined * keys) + scored * (2 + routers) * keys
        saved = width * saved + unnormalised(model.attention, batch)
        return Activations(saved, more * (2 * width * (queries + keys) + 8 * keys))

    def _rows_around(self, model: ModelConfig, batch: MicroBatch) -> tuple[int, int]:
        """What a rank that keeps its tokens attends to beside them, and what it scores."""
        lte, every = model.lte, (batch.rows - 1) * batch.samples * batch.length
        if not lte.train_cap and not self.exchanges_at_times(model, batch.ranks * batch.rows):
            return every, every
        retained = lte.buffer_size if lte.train_cap else (batch.rows - 1) * most_room(lte)
        scored = lte.window_size + 2 * lte.margin
        return scored + retained, scored

    def judged(self, model: ModelConfig, ranks: int) -> list[Shape]:
        from megahybrid_kernels.judging import shapes

        (heads, groups, head_dim), lte = rank_heads(model.attention, ranks), model.lte
        limits = {"window": lte.window_size, "buffer": lte.buffer_size, "sinks": lte.sink_size}
        return [
            shapes.LTEAttention(heads, head_dim, groups, **limits, delay=lte.margin),
            shapes.ExitPositions(heads, **limits),
            shapes.RetentionRouter(heads, head_dim, lte.conv_size, lte.conv_dilation),
            *judged_heads(model.attention, ranks),
        ]

    def module(self) -> type[Mixer]:
        from megahybrid.mixers.lte.module import LTEAttention

        return LTEAttention

    def exported(self) -> type:
        from megahybrid.mixers.lte.hf import LTEAttention

        return LTEAttention

    def regulator(self) -> type[Regulator]:
        from megahybrid.mixers.lte.controller import LambdaController

        return LambdaController


def room_for(expected: float, sinks: int) -> int:
    """For how many tokens of a head a context parallel rank makes room where so many are expected to be retained: half
    as many more, four standard deviations of a number by chance, and the sinks, as a power of two, so that it rarely
    changes."""
    return 1 << math.ceil(math.log2(1.5 * expected + 4 * math.sqrt(expected) + sinks + 1))


def most_room(lte: LTEConfig) -> int:
    """The most that there is: for a head that retains of one rank's tokens as many as its buffer holds."""
    return lte.buffer_size if lte.train_cap else room_for(lte.buffer_size, lte.sink_size)


def router_channels(head_dim: int) -> list[int]:
    """Channels that go into each of the router's convolutions, key and value together into the first, and out of the
    last: each halves them."""
    return [2 * head_dim >> halvings for halvings in range(CONVOLUTIONS + 1)]
