"""The ops of decode for `doctor`: one token of every sequence at a time, each step on the state of the one before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megahybrid.doctor.cases import Case, Inputs, Op, Size, delta_rule, normal, router, router_parameters
from megahybrid_kernels import Sequences
from megahybrid_kernels.attention import GrowingCache, KeyValueCache
from megahybrid_kernels.lte_attention import LTECache
from megahybrid_kernels.retention_router import RouterState

_STEPS, _COUNT = 80, 3
_TOKENS = _STEPS * _COUNT
# Many tokens leave the window, and the buffer, within these steps.
_WINDOW, _BUFFER, _SINKS, _DELAY = 23, 12, 2, 6

Step = Callable[[Op, Inputs, Sequences, Any], tuple[Tensor, Any]]


def decode_cases(size: Size) -> list[Case]:
    """Every op's step, at one size's heads."""
    rows = (_TOKENS, size.heads, size.head_dim)
    channels = size.gdn_heads * size.gdn_head_dim

    def qkv(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        return normal(dtype, generator, q=rows, k=rows, v=rows)

    def scored(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        return qkv(dtype, generator) | {"score": torch.rand(rows[:2], generator=generator) - 0.6}

    def memory(x: Inputs) -> Tensor:
        wider = torch.promote_types(x["k"].dtype, torch.float32)
        return x["k"].new_zeros(_COUNT, size.gdn_heads, size.gdn_head_dim, size.gdn_head_dim, dtype=wider)

    def cache(kind: Any, *sizes: int) -> Callable[[Inputs], Any]:
        return lambda x: kind.empty(_COUNT, size.heads, size.head_dim, *sizes, dtype=x["k"].dtype, device=x["k"].device)

    return [
        _case(
            ("gated_delta_rule", "gated_delta_rule", None),
            delta_rule(_TOKENS, size),
            memory,
            lambda op, x, sequences, state: op(*x.values(), sequences, state),
        ),
        _case(
            ("causal_conv1d", "causal_conv1d", None),
            lambda dtype, generator: normal(dtype, generator, x=(_TOKENS, channels), weight=(channels, 4)),
            lambda x: x["x"].new_zeros(_COUNT, 3, channels),
            lambda op, x, sequences, state: op(x["x"], x["weight"], sequences, state),
        ),
        _case(
            ("attention", "attention_with_cache", "attention_with_growing_cache"),
            qkv,
            cache(GrowingCache),
            lambda op, x, sequences, state: op(*x.values(), state, sequences),
            name="attention_full",
        ),
        _case(
            ("attention", "attention_with_cache", "attention_with_window_cache"),
            qkv,
            cache(KeyValueCache, _WINDOW),
            lambda op, x, sequences, state: op(*x.values(), state, sequences, _WINDOW),
            name="attention_window",
        ),
        _case(
            ("lte_attention", "lte_attention_with_cache", None),
            scored,
            cache(LTECache, _WINDOW, _BUFFER),
            lambda op, x, sequences, state: op(*x.values(), state, sequences, _WINDOW, _SINKS, _BUFFER, _DELAY),
        ),
        _case(
            ("retention_router", "retention_logits_streamed", None),
            router(_TOKENS, size),
            lambda x: RouterState.empty(_COUNT, router_parameters(x)),
            lambda op, x, sequences, state: op(x["k"], x["v"], router_parameters(x), sequences, state),
        ),
    ]


def _case(
    place: tuple[str, str, str | None],
    make: Callable[[torch.dtype, torch.Generator], Inputs],
    first: Callable[[Inputs], Any],
    step: Step,
    name: str | None = None,
) -> Case:
    """`place`: module, function, and its name in the reference; `first`: the state before the first token."""
    module, function, reference = place
    return Case(
        op=f"{name or module}_step",
        module=module,
        function=function,
        shape=f"steps={_STEPS} sequences={_COUNT}",
        sequences=Sequences.of((_STEPS,) * _COUNT),
        make=make,
        call=partial(_step_by_step, first, step),
        backward=False,
        reference=reference,
    )


def _step_by_step(first: Callable[[Inputs], Any], step: Step, op: Op, x: Inputs, sequences: Sequences) -> Tensor:
    """The outputs of all steps; what has a row a token is cut, and all else goes into every step."""
    device, state, outputs = sequences.cu_seqlens.device, first(x), []
    # As in generation, which lets an op write into its state; references offer no such choice.
    op = partial(op, in_place=True) if "in_place" in inspect.signature(op).parameters else op
    for number in range(_STEPS):
        now = {
            name: each[number * _COUNT : (number + 1) * _COUNT] if each.shape[0] == _TOKENS else each
            for name, each in x.items()
        }
        starts = torch.full((_COUNT,), number, dtype=torch.int64, device=device)
        output, state = step(op, now, Sequences.of((1,) * _COUNT, device, starts), state)
        outputs.append(output)
    return torch.cat(outputs[_DELAY:])  # a router's first rows have no meaning
