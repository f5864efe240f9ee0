"""The ops of attention under learnable token eviction."""

from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megahybrid.doctor.cases.attention import heads_shape, query_shapes
from megahybrid.doctor.cases.case import Case, Inputs, Make, Op, Size, normal
from megahybrid.doctor.cases.streamed import PIECES, SHORT, STEPS, Streamed, many_steps, streamed_case
from megahybrid_kernels import Sequences
from megahybrid_kernels.lte_attention import LTECache
from megahybrid_kernels.retention_router import Dropout, RouterParameters, RouterState, margin

# More than a chunk of far columns, and than a group of candidates that is sorted.
_LONG = (4400, 300)
# Small, so that many tokens leave the window, and the buffer, within the steps.
_STEPS_WINDOW, _STEPS_BUFFER, _STEPS_SINKS = 23, 12, 2


def cases(size: Size) -> list[Case]:
    """Over whole sequences."""
    return [_attention(size, None), _attention(size, size.buffer), _exits(size), _router(size)]


def more_cases(size: Size) -> list[Case]:
    """Other lengths and groups; prefill and decode."""
    far = replace(size, lte_window=size.far_lte_window, buffer=size.far_buffer)
    # A few heads, since the reference takes every pair of tokens in float64.
    long = replace(far, heads=min(size.heads, 2), lengths=_LONG)
    # A token may not leave the window before its score has come.
    window, router = max(_STEPS_WINDOW, _delay(size)), _streamed_router(size)
    steps = replace(size, lte_window=window, buffer=_STEPS_BUFFER, sinks=_STEPS_SINKS)
    more = [_attention(long, None, "long"), _attention(long, long.buffer, "long"), _exits(long, "long")]
    more += [streamed_case(_streamed_attention(long), "prefill", PIECES, "long")]
    more += [streamed_case(_streamed_attention(long), "prefill", SHORT, "short")]
    more += [streamed_case(_streamed_attention(steps), "step", STEPS)]
    more += [streamed_case(_streamed_attention(far), "step", many_steps(size.heads), "many")]
    if size.varied and size.groups == 1:
        more += [_attention(replace(size, groups=2), size.buffer, "grouped")]
        more += [streamed_case(_streamed_attention(replace(long, groups=2)), "prefill", PIECES, "grouped")]
        more += [streamed_case(_streamed_attention(replace(steps, groups=2)), "step", STEPS, "grouped")]
    more += [_router(size, dropped=0.0, variant="without dropout")]
    return [*more, streamed_case(router, "prefill", PIECES, "long"), streamed_case(router, "step", STEPS)]


def _scored(size: Size, tokens: int, share: float) -> Make:
    """q, k, v and scores of which `share` are positive."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = normal(dtype, generator, **query_shapes(size, tokens))
        return inputs | {"score": torch.rand((tokens, size.heads), generator=generator) - (1 - share)}

    return make


def _attention(size: Size, cap: int | None, variant: str = "") -> Case:
    name, share = ("uncapped", 0.12) if cap is None else ("capped", 0.3)
    return Case(
        f"lte_attention_{name}",
        "lte_attention",
        "lte_attention",
        f"{heads_shape(size)} window={size.lte_window} kept={share}" + ("" if cap is None else f" buffer={cap}"),
        size.sequences,
        _scored(size, size.tokens, share),
        lambda op, x, sequences: op(*x.values(), sequences, size.lte_window, size.sinks, cap),
        variant=variant,
    )


def _exits(size: Size, variant: str = "") -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        return {"score": _scored(size, size.tokens, 0.3)(dtype, generator)["score"]}

    return Case(
        "exit_positions",
        "exit_positions",
        "exit_positions",
        f"{size.packed} heads={size.heads} kept=0.3 window={size.lte_window} buffer={size.buffer}",
        size.sequences,
        make,
        lambda op, x, sequences: op(x["score"], sequences, size.lte_window, size.sinks, size.buffer),
        backward=False,
        judge=lambda exits, x, sequences: wrong_exits(exits, x["score"], sequences, size),
        variant=variant,
    )


def _router(size: Size, dropped: float = 0.1, variant: str = "") -> Case:
    def route(op: Op, x: Inputs, sequences: Sequences) -> Tensor:
        keys = torch.arange(sequences.tokens, device=x["k"].device) * 2654435761 % 2**32
        dropout = Dropout(dropped, keys) if dropped else None
        return op(x["k"], x["v"], router_parameters(x), sequences, dropout=dropout, dilation=size.router_dilation)

    shape = f"{size.packed} heads={size.heads} head_dim={size.head_dim}"
    make, place = router(size.tokens, size), ("retention_router", "retention_logits")
    return Case("retention_router", *place, shape, size.sequences, make, route, variant=variant)


def _delay(size: Size) -> int:
    return margin(size.router_taps, size.router_dilation)


def _streamed_attention(size: Size) -> Streamed:
    def first(x: Inputs, count: int) -> LTECache:
        sizes = (count, size.heads, size.head_dim, size.lte_window, size.buffer)
        return LTECache.empty(*sizes, dtype=x["k"].dtype, device=x["k"].device)

    def call(op: Op, x: Inputs, sequences: Sequences, cache: LTECache) -> tuple[Tensor, LTECache]:
        return op(*x.values(), cache, sequences, size.lte_window, size.sinks, size.buffer, _delay(size))

    place = ("lte_attention", "lte_attention", "lte_attention_with_cache")
    return Streamed(*place, lambda tokens: _scored(size, tokens, 0.4), first, call)


def _streamed_router(size: Size) -> Streamed:
    dilation = size.router_dilation

    def first(x: Inputs, count: int) -> RouterState:
        return RouterState.empty(count, router_parameters(x), dilation)

    def call(op: Op, x: Inputs, sequences: Sequences, state: RouterState) -> tuple[Tensor, Any]:
        return op(x["k"], x["v"], router_parameters(x), sequences, state, dilation)

    place = ("retention_router", "retention_router", "retention_logits_streamed")
    return Streamed(*place, lambda tokens: router(tokens, size), first, call, late=_delay(size))


def router(tokens: int, size: Size) -> Make:
    """Inputs of a retention router: keys, values and its parameters, which `router_parameters` puts together."""
    rows = (tokens, size.heads, size.head_dim)

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        fans = [2 * size.head_dim >> halvings for halvings in range(4)]
        inputs = normal(dtype, generator, k=rows, v=rows)
        for number, (fan, out) in enumerate(pairwise(fans)):
            weight = normal(dtype, generator, weight=(size.heads * out, fan, size.router_taps))["weight"]
            inputs[f"weight{number}"] = weight * (2 / (size.router_taps * fan)) ** 0.5
            inputs |= normal(dtype, generator, **{f"bias{number}": (size.heads * out,)})
        return inputs | normal(dtype, generator, projection=(size.heads, fans[-1]), projection_bias=(size.heads,))

    return make


def router_parameters(x: Inputs) -> RouterParameters:
    """The parameters among a router's inputs."""
    weights, biases = ([x[f"{name}{number}"] for number in range(3)] for name in ("weight", "bias"))
    return RouterParameters(tuple(weights), tuple(biases), x["projection"], x["projection_bias"])


def wrong_exits(exits: Tensor, score: Tensor, sequences: Sequences, size: Size) -> float:
    """Share of tokens that a buffer, played token by token, drops at another query than `exits` says."""
    expected = torch.cat([_played(part.tolist(), size) for part in score.cpu().split(sequences.lengths)])
    lengths = torch.tensor(sequences.lengths).repeat_interleave(torch.tensor(sequences.lengths))[:, None]
    positions = torch.cat([torch.arange(length) for length in sequences.lengths])[:, None]

    def seen(exits: Tensor) -> Tensor:
        # What queries can tell apart: no exit after the last of them, and none before the token leaves the window.
        exits = exits.minimum(lengths)
        return exits.where(exits > positions + size.lte_window + 1, 0)

    return (seen(exits.cpu()) != seen(expected)).double().mean().item()


def _played(score: list[list[float]], size: Size) -> Tensor:
    """int64 `[tokens, heads]`: the exit of each token of one document, 0 for those that the buffer never holds."""
    tokens, heads = len(score), len(score[0])
    exits = torch.zeros(tokens, heads, dtype=torch.int64)
    for head in range(heads):
        held: list[tuple[bool, float, int]] = []  # a heap, the first to go on top: lowest score, then youngest
        for token in range(tokens):
            sink = token < size.sinks
            if not sink and score[token][head] <= 0:
                continue
            rank = (sink, 0.0 if sink else score[token][head], -token)
            if len(held) == size.buffer:
                out = heapq.heappushpop(held, rank)
                if out == rank:
                    continue
                exits[-out[2], head] = token + size.lte_window + 1
            else:
                heapq.heappush(held, rank)
            exits[token, head] = tokens
    return exits
