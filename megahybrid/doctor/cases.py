"""Every op of megahybrid_kernels: its inputs, its call and how a result is judged, for `doctor` and tools/bench."""

from __future__ import annotations

import heapq
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megahybrid_kernels import Sequences
from megahybrid_kernels.retention_router import Dropout, RouterParameters

Inputs = dict[str, Tensor]
Op = Callable[..., Any]


@dataclass(frozen=True)
class Size:
    """One model's shapes and the lengths of the documents in a micro-batch."""

    lengths: tuple[int, ...]
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    gdn_heads: int
    gdn_head_dim: int
    window: int
    lte_window: int
    buffer: int
    sinks: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return sum(self.lengths)


SIZES = {
    # Small enough for float64, with borders beside the kernels' own, and the head dims of the recipes.
    "check": Size((513, 1, 64, 300, 146), 1024, 1408, 2, 64, 2, 128, 128, 95, 64),
    # The micro-batch of recipes/quickstart.yaml, one of its samples made of two documents.
    "small": Size((512,) * 7 + (301, 211), 128, 384, 4, 32, 4, 32, 128, 63, 64),
    # A 0.4B model's at 4096 tokens a sample.
    "large": Size((4096,) * 7 + (3001, 1000, 95), 1024, 2816, 16, 64, 8, 128, 1024, 768, 512),
}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        op: its name in the table.
        module, function: where the op lives, `megahybrid_kernels.<module>.<function>` and the same in its `reference`.
        shape: for the reader.
        sequences: borders of the micro-batch, on the CPU.
        make: inputs from a dtype and a generator, on the CPU.
        call: runs the op on inputs and sequences, returns the one output that training differentiates.
        constants: inputs without a gradient.
        backward: whether there is a gradient at all.
        judge: error of an output, in place of the comparison with the reference in float64.
        reference: the function's name in `reference`, where it is another.
        piece: what the op's PyTorch path calls in `reference`, where that is not the whole function.
    """

    op: str
    module: str
    function: str
    shape: str
    sequences: Sequences
    make: Callable[[torch.dtype, torch.Generator], Inputs]
    call: Callable[[Op, Inputs, Sequences], Tensor]
    constants: tuple[str, ...] = ()
    backward: bool = True
    judge: Callable[[Tensor, Inputs, Sequences], float] | None = None
    reference: str | None = None
    piece: str | None = None

    def load(self) -> ModuleType:
        """The op's module."""
        return importlib.import_module(f"megahybrid_kernels.{self.module}")


def cases(size: Size) -> list[Case]:
    """Every op that a pass over whole sequences runs, at one size."""
    sequences = Sequences.of(size.lengths)
    tokens = size.tokens
    packed = f"tokens={tokens} sequences={len(size.lengths)}"
    heads = f"{packed} heads={size.heads} head_dim={size.head_dim}"
    gdn = f"{packed} heads={size.gdn_heads} head_dim={size.gdn_head_dim}"
    lte = f"{heads} window={size.lte_window}"
    channels = size.gdn_heads * size.gdn_head_dim
    rows, wide = (tokens, size.heads, size.head_dim), (tokens, size.gdn_heads, size.gdn_head_dim)

    def scored(share: float) -> Callable[[torch.dtype, torch.Generator], Inputs]:
        def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
            inputs = normal(dtype, generator, q=rows, k=rows, v=rows)
            return inputs | {"score": torch.rand(rows[:2], generator=generator) - (1 - share)}

        return make

    def labelled(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = normal(dtype, generator, x=(tokens, size.hidden), weight=(size.intermediate, size.hidden))
        labels = torch.randint(size.intermediate, (tokens,), generator=generator)
        return inputs | {"weight": inputs["weight"] * size.hidden**-0.5, "labels": labels}

    def route(op: Op, x: Inputs, sequences: Sequences) -> Tensor:
        keys = torch.arange(sequences.tokens, device=x["k"].device) * 2654435761 % 2**32
        return op(x["k"], x["v"], router_parameters(x), sequences, dropout=Dropout(0.1, keys), dilation=2)

    def attend(window: int | None) -> Callable[[Op, Inputs, Sequences], Tensor]:
        return lambda op, x, sequences: op(x["q"], x["k"], x["v"], sequences, window)

    def attend_retained(cap: int | None) -> Callable[[Op, Inputs, Sequences], Tensor]:
        return lambda op, x, sequences: op(*x.values(), sequences, size.lte_window, size.sinks, cap)

    qkv, flat, inner = {"q": rows, "k": rows, "v": rows}, (tokens, size.hidden), (tokens, size.intermediate)
    return [
        Case(
            "gated_delta_rule",
            "gated_delta_rule",
            "gated_delta_rule",
            gdn,
            sequences,
            delta_rule(tokens, size),
            lambda op, x, sequences: op(*x.values(), sequences, None)[0],
        ),
        Case(
            "causal_conv1d",
            "causal_conv1d",
            "causal_conv1d",
            f"{packed} channels={channels} taps=4",
            sequences,
            lambda dtype, generator: normal(dtype, generator, x=(tokens, channels), weight=(channels, 4)),
            lambda op, x, sequences: op(x["x"], x["weight"], sequences, None)[0],
        ),
        Case(
            "attention_full",
            "attention",
            "attention",
            heads,
            sequences,
            lambda dtype, generator: normal(dtype, generator, **qkv),
            attend(None),
        ),
        Case(
            "attention_window",
            "attention",
            "attention",
            f"{heads} window={size.window}",
            sequences,
            lambda dtype, generator: normal(dtype, generator, **qkv),
            attend(size.window),
        ),
        Case(
            "lte_attention_uncapped",
            "lte_attention",
            "lte_attention",
            f"{lte} kept=0.12",
            sequences,
            scored(0.12),
            attend_retained(None),
        ),
        Case(
            "lte_attention_capped",
            "lte_attention",
            "lte_attention",
            f"{lte} kept=0.3 buffer={size.buffer}",
            sequences,
            scored(0.3),
            attend_retained(size.buffer),
        ),
        Case(
            "exit_positions",
            "exit_positions",
            "exit_positions",
            f"{packed} heads={size.heads} kept=0.3 window={size.lte_window} buffer={size.buffer}",
            sequences,
            lambda dtype, generator: {"score": scored(0.3)(dtype, generator)["score"]},
            lambda op, x, sequences: op(x["score"], sequences, size.lte_window, size.sinks, size.buffer),
            backward=False,
            judge=lambda exits, x, sequences: wrong_exits(exits, x["score"], sequences, size),
        ),
        Case("retention_router", "retention_router", "retention_logits", heads, sequences, router(tokens, size), route),
        Case(
            "rms_norm",
            "norm",
            "rms_norm",
            f"{packed} hidden={size.hidden}",
            sequences,
            lambda dtype, generator: normal(dtype, generator, x=flat, weight=flat[1:]),
            lambda op, x, sequences: op(x["x"], x["weight"], 1e-6),
        ),
        Case(
            "gated_rms_norm",
            "norm",
            "gated_rms_norm",
            gdn,
            sequences,
            lambda dtype, generator: normal(dtype, generator, x=wide, gate=wide, weight=wide[2:]),
            lambda op, x, sequences: op(x["x"], x["gate"], x["weight"], 1e-6),
        ),
        Case(
            "rotary",
            "rotary",
            "rotary",
            heads,
            sequences,
            lambda dtype, generator: normal(dtype, generator, x=rows),
            lambda op, x, sequences: op(x["x"], sequences.positions, 10000.0),
        ),
        Case(
            "swiglu",
            "swiglu",
            "swiglu",
            f"{packed} intermediate={size.intermediate}",
            sequences,
            lambda dtype, generator: normal(dtype, generator, gate=inner, up=inner),
            lambda op, x, sequences: op(x["gate"], x["up"]),
        ),
        Case(
            "linear_cross_entropy",
            "linear_cross_entropy",
            "linear_cross_entropy",
            f"{packed} hidden={size.hidden} vocabulary={size.intermediate}",
            sequences,
            labelled,
            lambda op, x, sequences: op(x["x"], x["weight"], x["labels"], z_loss=1e-4)[0],
            constants=("labels",),
            piece="statistics_and_gradient_",
        ),
    ]


def delta_rule(tokens: int, size: Size) -> Callable[[torch.dtype, torch.Generator], Inputs]:
    """Inputs of the gated delta rule, its gates as a model's are at first."""
    wide = (tokens, size.gdn_heads, size.gdn_head_dim)

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = normal(dtype, generator, q=wide, k=wide, v=wide, a=wide[:2], b=wide[:2])
        inputs["A_log"] = torch.empty(size.gdn_heads).uniform_(1e-4, 16, generator=generator).log()
        inputs["dt_bias"] = torch.empty(size.gdn_heads).uniform_(-6, -2, generator=generator)
        return inputs

    return make


def router(tokens: int, size: Size) -> Callable[[torch.dtype, torch.Generator], Inputs]:
    """Inputs of a retention router: keys, values and its parameters, which `router_parameters` puts together."""
    rows = (tokens, size.heads, size.head_dim)

    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        fans = [2 * size.head_dim >> halvings for halvings in range(4)]
        inputs = normal(dtype, generator, k=rows, v=rows)
        for number, (fan, out) in enumerate(pairwise(fans)):
            weight = normal(dtype, generator, weight=(size.heads * out, fan, 3))["weight"]
            inputs[f"weight{number}"] = weight * (2 / (3 * fan)) ** 0.5
            inputs |= normal(dtype, generator, **{f"bias{number}": (size.heads * out,)})
        return inputs | normal(dtype, generator, projection=(size.heads, fans[-1]), projection_bias=(size.heads,))

    return make


def router_parameters(x: Inputs) -> RouterParameters:
    """The parameters among a router's inputs."""
    weights, biases = ([x[f"{name}{number}"] for number in range(3)] for name in ("weight", "bias"))
    return RouterParameters(tuple(weights), tuple(biases), x["projection"], x["projection_bias"])


def normal(dtype: torch.dtype, generator: torch.Generator, **shapes: tuple[int, ...]) -> Inputs:
    """Standard normal inputs by name and shape."""
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


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
