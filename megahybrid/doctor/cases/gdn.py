"""The ops of Gated DeltaNet."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megahybrid.doctor.cases.case import Case, Inputs, Make, Op, Size, normal, normals
from megahybrid.doctor.cases.streamed import PIECES, STEPS, Streamed, many_steps, streamed_case
from megahybrid_kernels import Sequences

# The plan cuts the first into segments.
_LONG = (2500, 130, 1)


def cases(size: Size) -> list[Case]:
    """Over whole sequences."""
    wide = (size.tokens, size.gdn_heads, size.value_dim)
    shape = f"{size.packed} heads={size.gdn_heads} head_dim={size.value_dim}"
    return [
        _rule(size),
        _convolution(size, size.gdn_heads * size.gdn_head_dim),
        Case(
            "gated_rms_norm",
            "norm",
            "gated_rms_norm",
            shape,
            size.sequences,
            normals(x=wide, gate=wide, weight=wide[2:]),
            lambda op, x, sequences: op(x["x"], x["gate"], x["weight"], 1e-6),
        ),
    ]


def more_cases(size: Size) -> list[Case]:
    """Other lengths and dims; prefill and decode."""
    long = replace(size, lengths=_LONG)
    rule, convolution = _streamed_rule(size), _streamed_convolution(size, size.gdn_heads * size.gdn_head_dim)
    more = [_rule(long, "in segments")]
    if size.varied:
        half, twice = max(1, size.gdn_head_dim // 2), 2 * size.gdn_head_dim
        more += [_rule(replace(size, gdn_value_dim=half), "narrow values")]
        more += [_rule(replace(long, gdn_value_dim=twice), "wide values in segments")]
    more += [streamed_case(rule, "prefill", PIECES, "long")]
    more += [streamed_case(rule, "step", STEPS), streamed_case(rule, "step", many_steps(size.gdn_heads), "many")]
    more += [streamed_case(convolution, "prefill", PIECES, "long"), streamed_case(convolution, "step", STEPS)]
    if size.value_dim != size.gdn_head_dim:
        values = size.gdn_heads * size.value_dim
        more += [_convolution(size, values, "values")]
        more += [streamed_case(_streamed_convolution(size, values), "prefill", PIECES, "values")]
    return more


def _rule(size: Size, variant: str = "") -> Case:
    return Case(
        "gated_delta_rule",
        "gated_delta_rule",
        "gated_delta_rule",
        f"{size.packed} heads={size.gdn_heads} head_dim={size.gdn_head_dim}",
        size.sequences,
        delta_rule(size.tokens, size),
        lambda op, x, sequences: op(*x.values(), sequences)[0],
        variant=variant,
    )


def _convolution(size: Size, channels: int, variant: str = "") -> Case:
    return Case(
        "causal_conv1d",
        "causal_conv1d",
        "causal_conv1d",
        f"{size.packed} channels={channels} taps={size.conv_taps}",
        size.sequences,
        normals(x=(size.tokens, channels), weight=(channels, size.conv_taps)),
        lambda op, x, sequences: op(x["x"], x["weight"], sequences)[0],
        variant=variant,
    )


def delta_rule(tokens: int, size: Size) -> Make:
    """Inputs of the gated delta rule, its gates as a model's are at first."""
    keys, values = ((tokens, size.gdn_heads, dim) for dim in (size.gdn_head_dim, size.value_dim))

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = normal(dtype, generator, q=keys, k=keys, v=values, a=keys[:2], b=keys[:2])
        rates = torch.empty(size.gdn_heads).uniform_(1e-4, 16, generator=generator).log()
        biases = torch.empty(size.gdn_heads).uniform_(-6, -2, generator=generator)
        return inputs | {"A_log": rates.to(dtype), "dt_bias": biases.to(dtype)}

    return make


def _streamed_rule(size: Size) -> Streamed:
    def first(x: Inputs, count: int) -> Tensor:
        wider = torch.promote_types(x["k"].dtype, torch.float32)
        return x["k"].new_zeros(count, size.gdn_heads, size.gdn_head_dim, size.value_dim, dtype=wider)

    def call(op: Op, x: Inputs, sequences: Sequences, state: Tensor) -> tuple[Tensor, Tensor]:
        return op(*x.values(), sequences, state, output_final_state=True)

    place = ("gated_delta_rule",) * 3
    return Streamed(*place, lambda tokens: delta_rule(tokens, size), first, call)


def _streamed_convolution(size: Size, channels: int) -> Streamed:
    def make(tokens: int) -> Make:
        return normals(x=(tokens, channels), weight=(channels, size.conv_taps))

    def first(x: Inputs, count: int) -> Tensor:
        return x["x"].new_zeros(count, size.conv_taps - 1, channels)

    def call(op: Op, x: Inputs, sequences: Sequences, state: Tensor) -> tuple[Tensor, Tensor]:
        return op(x["x"], x["weight"], sequences, state, output_final_state=True)

    return Streamed(*("causal_conv1d",) * 3, make, first, call)
