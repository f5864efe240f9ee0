"""The modules of softmax attention, and the projections of all that have its heads."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from megahybrid.config.schema import ModelConfig
from megahybrid.mixers.attention import AttentionKind
from megahybrid.model.context import Aux, Context
from megahybrid.model.mixer import Fallback, Mixer
from megahybrid.model.settings import Settings
from megahybrid.parallel import groups, tokens
from megahybrid.parallel.heads import to_heads, to_tokens
from megahybrid.parallel.layers import ColumnLinear, RowLinear, project, shared
from megahybrid.parallel.parameters import constant, parameter
from megahybrid_kernels import Sequences
from megahybrid_kernels.attention import GrowingCache, KeyValueCache, attention, attention_with_cache, unsupported
from megahybrid_kernels.norm import rms_norm
from megahybrid_kernels.rotary import rotary, rotary_of_both


class AttentionProjections(Mixer):
    """The q, k, v and o projections that all softmax mixers share; heads split over tensor parallel ranks.

    Between `project` and `output` a context parallel rank has all tokens of its own heads, or its own tokens where it
    keeps them.
    """

    section = AttentionKind.section
    only_projects = True

    def __init__(self, settings: Settings, layer: int):
        super().__init__(settings, layer)
        config = getattr(settings.model, self.section)
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        hidden, queries, keys = settings.model.hidden_size, config.num_heads, config.num_kv_heads
        self.q_proj = ColumnLinear(hidden, queries * self.head_dim, settings.projection)
        self.k_proj = ColumnLinear(hidden, keys * self.head_dim, settings.projection, parts=keys)
        self.v_proj = ColumnLinear(hidden, keys * self.head_dim, settings.projection, parts=keys)
        self.o_proj = RowLinear(queries * self.head_dim, hidden, settings.output_projection, settings.sequence_parallel)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            norm = functools.partial(
                parameter, self.head_dim, initializer=constant(1.0), weight_decay=False, partial=True
            )
            self.q_norm, self.k_norm = norm(), norm()

    def project(self, x: Tensor, *more: ColumnLinear, stay: bool | None = None) -> tuple[Tensor, ...]:
        """`[tokens, 1, hidden]` → q, k, v `[tokens, heads of this rank, head_dim]`, normalised, not yet rotated, and
        likewise what `more` projections of the same input give, which have the query heads in front.

        stay: whether a rank keeps its tokens in this pass; `keeps_tokens` when left out.
        """
        layers = self.q_proj, self.k_proj, self.v_proj, *more
        outputs = project(x, layers, self.settings.sequence_parallel)
        queries = outputs[0].shape[-1] // self.head_dim
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in outputs[:3])
        if self.qk_norm:
            eps = self.settings.model.norm_eps
            q, k = rms_norm(q, shared(self.q_norm), eps), rms_norm(k, shared(self.k_norm), eps)
        parts = q, k, v, *(y.unflatten(-1, (queries, -1)) for y in outputs[3:])
        return parts if (self.keeps_tokens if stay is None else stay) else to_heads(*parts)

    @property
    def counted_heads(self) -> int:
        """This rank's KV heads, of which what is seen and held is asked; of ranks that share one, the first's."""
        weight, (rank, ranks) = self.k_proj.weight, groups.context_parallel()
        heads = len(weight) // self.head_dim
        if self.keeps_tokens:
            return heads if weight.tensor_model_parallel and rank == 0 else 0
        first = weight.tensor_model_parallel and rank % max(1, ranks // heads) == 0
        return max(1, heads // ranks) if first else 0

    def rotate(
        self, q: Tensor, k: Tensor, sequences: Sequences, of_keys: Sequences | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotary embedding at the tokens' positions in their documents, if there is one; keys may be of others."""
        if self.theta is None:
            return q, k
        if of_keys is None:
            return rotary_of_both(q, k, sequences.positions, self.theta)
        return rotary(q, sequences.positions, self.theta), rotary(k, of_keys.positions, self.theta)

    def seen(self, k: Tensor, context: Context, window: int | None, kept: Tensor | None = None) -> Aux | None:
        """What of a watch the heads see: `window` keys, the query's own included (None for all), and those that are
        `kept`, bool `[pairs, heads of this rank]`."""
        if context.watch is None:
            return None
        distance = context.watch.distances(context.sequences)[:, None].expand(-1, k.shape[1])
        near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        seen = near if kept is None else near | (kept & (distance >= 0))
        return Aux(seen=seen[:, : self.counted_heads])

    def output(self, o: Tensor, stay: bool | None = None) -> Tensor:
        """What comes of `project` → `[tokens, 1, hidden]`."""
        return self.o_proj((o if (self.keeps_tokens if stay is None else stay) else to_tokens(o)).flatten(-2))


def every_position(cache: GrowingCache) -> Tensor:
    """`Mixer.held` of a cache of all tokens, `[sequences, 1, slots]`."""
    device = cache.k.device
    slots, lengths = torch.arange(cache.slots, device=device), torch.tensor(cache.lengths, device=device)
    return torch.where(slots < lengths[:, None], slots, -1)[:, None]


class FullAttention(AttentionProjections):
    """Causal attention to the whole document."""

    window_size: int | None = None

    def forward(self, x: Tensor, context: Context, state: KeyValueCache | GrowingCache | None = None):
        q, k, v = self.project(x)
        q, k = self.rotate(q, k, context.sequences)
        state = self.begun(state, context)
        if state is None:
            o = attention(q, k, v, context.sequences, self.window_size)
        else:
            o, state = attention_with_cache(q, k, v, state, context.sequences, self.window_size, context.in_place)
        return self.output(o), self.seen(k, context, self.window_size), state

    def initial_state(self, sequences: int) -> KeyValueCache | GrowingCache:
        like = self.k_proj.weight
        sizes, kind = (
            (sequences, like.shape[0] // self.head_dim, self.head_dim),
            {"dtype": like.dtype, "device": like.device},
        )
        if self.window_size is None:
            return GrowingCache.empty(*sizes, **kind)
        return KeyValueCache.empty(*sizes, self.window_size, **kind)

    def held(self, state: KeyValueCache | GrowingCache) -> Tensor:
        if isinstance(state, GrowingCache):
            return every_position(state).expand(-1, self.counted_heads, -1)
        left = state.positions <= state.positions.amax(-1, keepdim=True) + 1 - self.window_size
        return state.positions.masked_fill(left, -1)[:, None].expand(-1, self.counted_heads, -1)

    @classmethod
    def fallbacks(cls, model: ModelConfig, dtype: torch.dtype) -> Iterator[Fallback]:
        if reason := unsupported(dtype, model.attention.head_dim):
            if dtype == torch.float32:  # which small models may choose
                yield Fallback("attention", reason, "train.dtype")
            else:
                yield Fallback("attention", reason, "model.attention.head_dim", quadratic=cls is FullAttention)


class SlidingWindowAttention(FullAttention):
    """Causal attention to the last `window_size` tokens of the document, the query's own included."""

    def __init__(self, settings: Settings, layer: int):
        super().__init__(settings, layer)
        self.window_size = settings.model.attention.window_size

    def forward(self, x: Tensor, context: Context, state: KeyValueCache | None = None):
        if not self.keeps_tokens:
            return super().forward(x, context, state)
        q, k, v = self.project(x)
        q, k = self.rotate(q, k, tokens.own(context.sequences))
        keys, values = tokens.borrow(tokens.rows_around(context.sequences, self.window_size - 1), k, v)
        before = len(keys.before)
        # Nobody asks for what queries of the rows before would give.
        queries = torch.cat([q.new_zeros(before, *q.shape[1:]), q])
        rows = tokens.own(context.sequences, before)
        o = attention(queries, keys.joined(), values.joined(), rows, self.window_size)[before:]
        return self.output(o), self.seen(k, context, self.window_size), None
