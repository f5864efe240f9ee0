"""The module of LTE, with its router."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megahybrid.config.schema import ModelConfig
from megahybrid.mixers.attention.module import AttentionProjections
from megahybrid.mixers.lte import LTEKind, router_channels
from megahybrid.mixers.lte.policies import Policy, made
from megahybrid.mixers.lte.retained import Rows, retained, rows_seen
from megahybrid.model.context import Aux, Context
from megahybrid.model.mixer import Fallback
from megahybrid.model.settings import Settings
from megahybrid.parallel import groups, tokens
from megahybrid.parallel.heads import gather_tokens, own_heads
from megahybrid.parallel.parameters import constant, kaiming_normal, parameter, uniform
from megahybrid_kernels import Sequences
from megahybrid_kernels.exit_positions import exit_positions
from megahybrid_kernels.lte_attention import LTECache, lte_attention, lte_attention_with_cache
from megahybrid_kernels.lte_attention import unsupported as attention_unsupported
from megahybrid_kernels.retention_router import (
    Dropout,
    RouterParameters,
    RouterState,
    retention_logits,
    retention_scores,
    retention_scores_streamed,
)
from megahybrid_kernels.retention_router import unsupported as router_unsupported


class LTEState(NamedTuple):
    """What an LTE layer remembers of each sequence: window ring and eviction buffer, and what scores follow from: the
    router's last rows, or a policy's state."""

    cache: LTECache
    scorer: RouterState | Tensor


def _cut(sequences: Sequences, margin: int) -> tuple[Tensor, Tensor]:
    """bool `[tokens, 1]`, whose right context is not whole, and int64 `[1]`, of how many it is."""
    cut = (sequences.remaining < margin).unsqueeze(-1)
    return cut, len(cut) - cut.sum(0)


# Of sequences that begin here: the ops make nothing that they would not read.
_NOTHING = LTEState(None, None)


class Router(nn.Module):
    """Retention router: a stack of three convolutions and a projection a key-value head.

    Its parameters are attributes of the module that uses them, since ZeRO-3 gathers a module's own parameters only.
    """

    def __init__(self, settings: Settings):
        super().__init__()
        attention, lte = settings.model.attention, settings.model.lte
        heads, channels = attention.num_kv_heads, router_channels(attention.head_dim)
        self.dilation, self.routing_grad = lte.conv_dilation, lte.routing_grad
        for number, (fan, out) in enumerate(itertools.pairwise(channels)):
            fan_in = fan * lte.conv_size
            bound = fan_in**-0.5
            weight = parameter(heads * out, fan, lte.conv_size, axis=0, initializer=kaiming_normal(fan_in))
            bias = parameter(heads * out, axis=0, initializer=uniform(-bound, bound), weight_decay=False)
            self.register_parameter(f"conv{number}_weight", weight)
            self.register_parameter(f"conv{number}_bias", bias)
        self.projection = parameter(heads, channels[-1], axis=0, initializer=kaiming_normal(channels[-1]))
        # Positive: at first most tokens are kept, and the L1 term prunes.
        self.projection_bias = parameter(heads, axis=0, initializer=constant(0.5), weight_decay=False)

    def forward(
        self, k: Tensor, v: Tensor, sequences: Sequences, dropout: Dropout | None, whole: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores in (-1/2, 1/2) `[tokens, kv heads of this rank]`; and k and v for all other uses, see the op.

        whole: whether the rank works for all of its parameters' heads, whatever context parallel ranks there are.
        """
        parameters = self.parameters_for_op(whole)
        if self.routing_grad:
            return retention_scores(k, v, parameters, sequences, dropout, self.dilation)
        scores, *_ = retention_scores(k.detach(), v.detach(), parameters, sequences, dropout, self.dilation)
        return scores, k, v

    def streamed(
        self, k: Tensor, v: Tensor, sequences: Sequences, state: RouterState | None
    ) -> tuple[Tensor, RouterState]:
        """Scores, `margin` tokens later, from the state, or where sequences begin without one."""
        return retention_scores_streamed(k, v, self.parameters_for_op(), sequences, state, self.dilation)

    def parameters_for_op(self, whole: bool = False) -> RouterParameters:
        """The op's view of the parameters of this rank's heads, or `whole` ones."""
        own = (lambda weight: weight) if whole else own_heads
        weights = map(own, (self.conv0_weight, self.conv1_weight, self.conv2_weight))
        biases = map(own, (self.conv0_bias, self.conv1_bias, self.conv2_bias))
        return RouterParameters(tuple(weights), tuple(biases), own(self.projection), own(self.projection_bias))


class LTEAttention(AttentionProjections):
    """Attention to a window, the sinks, and older tokens whose retention score is positive.

    `l1_lambda`, fp32 `[kv heads of this rank]`, weighs the L1 term. `room`, int64 on the host, is for how many retained
    tokens of a head a context parallel rank has room that trains without a cap and keeps its tokens; at 0 ranks
    exchange tokens for heads, or heads being too few, pass on all. The controller sets both between steps. A `policy`
    takes the place of the router's scores.
    """

    def __init__(self, settings: Settings, layer: int):
        super().__init__(settings, layer)
        self.lte = settings.model.lte
        self.router = Router(settings)
        every = settings.model.attention.num_kv_heads
        rank, ranks = groups.tensor_parallel() if self.keeps_tokens else groups.head_parallel()
        self.heads = every // ranks
        self.first_head = rank * self.heads
        self.scores_per_token = every * len(settings.pattern.layers(LTEKind.letter))
        self.l1_lambda = torch.zeros(self.heads, device="cpu")  # models are made on the meta device
        self.room = torch.zeros((), dtype=torch.int64, device="cpu")
        self.exchanges_at_times = LTEKind().exchanges_at_times(settings.model, groups.head_parallel()[1])
        self.policy: Policy | None = None

    def forward(self, x: Tensor, context: Context, state: LTEState | None = None):
        """`[tokens, 1, hidden]` → (the same, by-products in training, the next state)."""
        stay = self.keeps_tokens and not (self.exchanges_at_times and self._room(context) is None)
        q, k, v = self.project(x, stay=stay)
        if state is not None or context.keep_states:
            return self._continue(q, k, v, context, state or _NOTHING)
        if stay:
            return self._own_tokens(q, k, v, context)
        lte, sequences = self.lte, context.sequences
        if self.policy is None:
            scores, k, v = self.router(k, v, sequences, self._dropout(context, k.shape[1]), whole=False)
        q, rotated = self.rotate(q, k, context.sequences)
        if self.policy is not None:
            scores, _ = self.policy.scores(k, (q, rotated), sequences, self.policy.state(sequences.count))
        limits = lte.window_size, lte.sink_size, self._cap(context)
        o = lte_attention(q, rotated, v, scores, sequences, *limits, lte.gate)
        aux = self._aux(scores, context) if context.training else self._seen(k, scores, context)
        return self.output(o, stay), aux, None

    def _cap(self, context: Context) -> int | None:
        """How many retained tokens a query sees."""
        return None if context.training and not self.lte.train_cap else self.lte.buffer_size

    def _room(self, context: Context) -> int | None:
        """For `retained`."""
        return self._cap(context) or (0 if context.whole else int(self.room)) or None

    def _own_tokens(self, q: Tensor, k: Tensor, v: Tensor, context: Context):
        lte, sequences, count, cap, room = self.lte, context.sequences, len(k), self._cap(context), self._room(context)
        keys, values = tokens.borrow(rows_seen(sequences, lte, room), k, v)
        before, after = len(keys.before), len(keys.after)
        first, around = groups.context_parallel()[0] * count, tokens.own(sequences, before, after)
        dropout = self._dropout(context, self.heads, slice(first - before, first + count + after))
        # It scores the rows around the own ones as their owners do, mostly few: in place of an exchange of scores.
        scores, k, v = self.router(keys.joined(), values.joined(), around, dropout, whole=True)
        q, k = self.rotate(q, k, tokens.own(sequences), around)
        rows, more, missing = retained(Rows(k, v, scores), before, sequences, lte, room, cap is not None)
        if more is not None:
            rows, around = Rows(*map(torch.cat, zip(more, rows, strict=True))), around.longer(len(more.k))
        # Nobody asks for what queries of the other rows would give.
        before = len(rows.k) - count - after
        queries = torch.cat([q.new_zeros(before, *q.shape[1:]), q, q.new_zeros(after, *q.shape[1:])])
        o = lte_attention(queries, *rows, around, lte.window_size, lte.sink_size, cap, lte.gate)
        own = rows.score[before : before + count]
        if context.training:
            aux = self._aux(own, context, slice(first, first + count), missing)
        else:
            aux = self._seen(k, gather_tokens(own), context)
        return self.output(o[before : before + count], stay=True), aux, None

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: LTEState):
        lte, sequences = self.lte, context.sequences
        q, rotated = self.rotate(q, k, context.sequences)
        if self.policy is None:
            scores, scorer = self.router.streamed(k, v, sequences, state.scorer)
            delay = lte.margin
        else:
            state = self.initial_state(sequences.count) if state is _NOTHING else state
            scores, scorer = self.policy.scores(k, (q, rotated), sequences, state.scorer, state.cache)
            delay = self.policy.delay
        o, cache = lte_attention_with_cache(
            *(q, rotated, v, scores, state.cache, sequences, lte.window_size, lte.sink_size, lte.buffer_size, delay),
            in_place=context.in_place,
        )
        return self.output(o), None, LTEState(cache, scorer)

    def _dropout(self, context: Context, heads: int, rows: slice = slice(None)) -> Dropout | None:
        if not context.training or self.lte.dropout == 0:
            return None
        first = self.first_head
        if heads < self.heads:  # those of this rank, which usually works for all
            first += groups.context_parallel()[0] * heads
        return Dropout(self.lte.dropout, context.dropout_keys[self.layer][rows], first * 2 * self.head_dim)

    def _aux(self, scores: Tensor, context: Context, rows: slice = slice(None), missing: Tensor | None = None) -> Aux:
        """L1 term, and how many positions are kept and counted: those whose right context is whole.

        The L1 sum is divided by a number fixed by shapes (tokens times scores a token), so that it does not depend on
        how documents fall into micro-batches. Of all tokens `scores` has those `rows`.
        """
        cut, positions = context.sequences.once(_cut, self.lte.margin)
        excess = scores.masked_fill(cut[rows], 0).relu()
        kept = (excess > 0).sum(0)
        lambdas = self.l1_lambda if len(kept) == self.heads else own_heads(self.l1_lambda)
        loss = torch.dot(lambdas.to(scores), excess.sum(0)) / (len(cut) * self.scores_per_token)
        counts = {"kept": kept, "positions": positions}
        return Aux(loss, counts if missing is None else counts | {"missing": missing})

    def _seen(self, k: Tensor, scores: Tensor, context: Context) -> Aux | None:
        if context.watch is None:
            return None
        lte, (queries, keys), sequences = self.lte, context.watch, context.sequences
        exits = exit_positions(scores, sequences, lte.window_size, lte.sink_size, lte.buffer_size)
        kept = sequences.positions[queries, None] < exits[keys]
        return self.seen(k, context, lte.window_size + 1, kept)

    def initial_state(self, sequences: int) -> LTEState:
        like, lte = self.k_proj.weight, self.lte
        cache = LTECache.empty(
            *(sequences, self.heads, self.head_dim, lte.window_size, lte.buffer_size),
            dtype=like.dtype,
            device=like.device,
        )
        if self.policy is not None:
            return LTEState(cache, self.policy.state(sequences))
        return LTEState(cache, RouterState.empty(sequences, self.router.parameters_for_op(), lte.conv_dilation))

    def swap(self, policy: str, wanted: Sequence[Sequence[int]], numbers: Sequence[int]) -> None:
        self.policy = made(self, policy, wanted, numbers)

    def balance(self, x: Tensor, context: Context) -> dict[str, Tensor]:
        _, k, v = self.project(x)
        logits = retention_logits(
            k, v, self.router.parameters_for_op(), context.sequences, None, self.lte.conv_dilation
        )
        # In the widest gap between the first and the last quarter, so that no rounding decides.
        middle = logits.sort(0).values[len(logits) // 4 : -(len(logits) // 4)]
        gap = middle.diff(dim=0).argmax(0, keepdim=True)
        return {"router.projection_bias": -(middle.gather(0, gap) + middle.gather(0, gap + 1)).squeeze(0) / 2}

    def held(self, state: LTEState) -> Tensor:
        ring, buffer = state.cache.positions[:, None], state.cache.buffer_positions
        left = ring <= ring.amax(-1, keepdim=True) - self.lte.window_size  # the buffer has it, if anything does
        return torch.cat([ring.masked_fill(left, -1).expand(-1, self.heads, -1), buffer], -1)

    @classmethod
    def fallbacks(cls, model: ModelConfig, dtype: torch.dtype) -> Iterator[Fallback]:
        key, head_dim = "model.attention.head_dim", model.attention.head_dim
        if reason := attention_unsupported(dtype, head_dim):
            yield Fallback("lte_attention", reason, key, quadratic=True)
        if reason := router_unsupported(dtype, head_dim):
            yield Fallback("retention_router", reason, key)
