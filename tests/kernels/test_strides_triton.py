"""Every op with inputs, weights, states and gradients whose values do not lie side by side, against contiguous ones.

Triton's kernels run on a GPU where there is one, else on Triton's interpreter; the PyTorch paths run, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import pytest
import torch
from cases import interpreted
from torch import Tensor

from megahybrid_kernels import Sequences
from megahybrid_kernels.attention import KeyValueCache, attention, attention_with_cache
from megahybrid_kernels.causal_conv1d import causal_conv1d
from megahybrid_kernels.exit_positions import exit_positions
from megahybrid_kernels.gated_delta_rule import gated_delta_rule
from megahybrid_kernels.gemv import add_rms_norm_gemv, gated_rms_norm_gemv, swiglu_gemv
from megahybrid_kernels.linear_cross_entropy import linear_cross_entropy
from megahybrid_kernels.lte_attention import LTECache, lte_attention, lte_attention_with_cache
from megahybrid_kernels.native_sparse_attention import (
    NSACache,
    native_sparse_attention,
    native_sparse_attention_with_cache,
)
from megahybrid_kernels.norm import add_rms_norm, gated_rms_norm, rms_norm
from megahybrid_kernels.retention_router import (
    Dropout,
    RouterParameters,
    RouterState,
    retention_scores,
    retention_scores_streamed,
)
from megahybrid_kernels.rotary import rotary
from megahybrid_kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS, STEP = (5, 14, 1), (1, 1, 1)
HEADS, DIM, WINDOW, BUFFER, SINKS, LATE = 2, 16, 7, 4, 1, 6
Inputs = dict[str, Tensor]
DISPATCHERS = (
    "attention",
    "causal_conv1d",
    "exit_positions",
    "gated_delta_rule",
    "gemv",
    "linear_cross_entropy.chunks",
    "lte_attention",
    "native_sparse_attention",
    "norm",
    "retention_router",
    "rotary",
    "swiglu",
)


@dataclass(frozen=True)
class Case:
    """A call of an op: `shapes` of its float inputs, what else it reads, and the call, which gives all its results.

    `no_gradients` names floats that are not differentiated, or "all". `dense` names what stays contiguous, as a state
    must that the op overwrites.
    """

    call: Callable[[Inputs], tuple[Tensor, ...]]
    shapes: dict[str, tuple[int, ...]]
    others: Inputs
    no_gradients: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()


def rows(lengths: tuple[int, ...], **widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {name: (sum(lengths), *width) for name, width in widths.items()}


def wide(lengths: tuple[int, ...], *names: str, groups: int = 1) -> dict[str, tuple[int, ...]]:
    return rows(lengths, **{name: (HEADS * (groups if name == "q" else 1), DIM) for name in names})


def starting(x: Inputs) -> Sequences:
    return Sequences.of(STEP, DEVICE, x["starts"])


def whole(lengths: tuple[int, ...] = LENGTHS) -> Sequences:
    return Sequences.of(lengths, DEVICE)


def delta_rule(lengths: tuple[int, ...], in_place: bool) -> Case:
    names = ("q", "k", "v", "a", "b", "A_log", "dt_bias")
    shapes = wide(lengths, "q", "k", "v") | rows(lengths, a=(HEADS,), b=(HEADS,)) | dict.fromkeys(names[5:], (HEADS,))
    shapes["state"] = (len(lengths), HEADS, DIM, DIM)
    return Case(
        lambda x: gated_delta_rule(*(x[n] for n in names), whole(lengths), x["state"], in_place=in_place),
        shapes, {}, ("all",) if in_place else (),
    )  # fmt: skip


def convolution(lengths: tuple[int, ...], in_place: bool) -> Case:
    return Case(
        lambda x: causal_conv1d(x["x"], x["weight"], whole(lengths), x["state"], in_place=in_place),
        rows(lengths, x=(24,)) | {"weight": (24, 4), "state": (len(lengths), 3, 24)}, {}, ("all",) if in_place else (),
    )  # fmt: skip


ROUTER = {f"weight{n}": (HEADS * (DIM >> n), 2 * DIM >> n, 3) for n in range(3)}
ROUTER |= {f"bias{n}": (HEADS * (DIM >> n),) for n in range(3)}
ROUTER |= {"projection": (HEADS, DIM >> 2), "projection_bias": (HEADS,)}


def parameters(x: Inputs) -> RouterParameters:
    weights, biases = (tuple(x[f"{name}{n}"] for n in range(3)) for name in ("weight", "bias"))
    return RouterParameters(weights, biases, x["projection"], x["projection_bias"])


def streamed(x: Inputs, sequences: Sequences) -> tuple[Tensor, ...]:
    states = tuple(x[f"state{n}"] for n in range(3))
    state = RouterState(tuple(map(torch.zeros_like, states)) if sequences.starts is None else states)
    scores, state = retention_scores_streamed(x["k"], x["v"], parameters(x), sequences, state)
    if sequences.starts is None:  # the first rows have no score, and mean nothing
        scores = scores.where(sequences.offsets[:, None] >= LATE, 0)
    return scores, *state.rows


def router_states(count: int) -> dict[str, tuple[int, ...]]:
    return {f"state{n}": (count, 4, HEADS, 2 * DIM >> n) for n in range(3)}


def lte(buffer: int | None) -> Case:
    return Case(
        lambda x: (lte_attention(*(x[n] for n in ("q", "k", "v", "score")), whole(), WINDOW, SINKS, buffer),),
        wide(LENGTHS, "q", "k", "v", groups=2) | rows(LENGTHS, score=(HEADS,)), {},
    )  # fmt: skip


# Of all sequences alike: full windows and buffers.
LTE_CACHE = {
    "ring_k": (3, HEADS, WINDOW + 1, DIM), "ring_v": (3, HEADS, WINDOW + 1, DIM), "ring_score": (3, HEADS, WINDOW + 1),
    "buffer_k": (3, HEADS, BUFFER, DIM), "buffer_v": (3, HEADS, BUFFER, DIM), "buffer_score": (3, HEADS, BUFFER),
}  # fmt: skip
START = 24


def lte_cached(lengths: tuple[int, ...], in_place: bool) -> Case:
    def call(x: Inputs) -> tuple[Tensor, ...]:
        cache = LTECache(
            x["ring_k"], x["ring_v"], x["ring_positions"], x["ring_score"], x["buffer_k"], x["buffer_v"],
            x["buffer_score"].abs(), x["buffer_positions"],
        )  # fmt: skip
        sequences = Sequences.of(lengths, DEVICE, x["starts"])
        late = (cache, sequences, WINDOW, SINKS, BUFFER, LATE)
        o, cache = lte_attention_with_cache(*(x[n] for n in ("q", "k", "v", "score")), *late, in_place)
        order = cache.buffer_positions.argsort(-1)
        in_order = (y.gather(2, order) for y in (cache.buffer_positions, cache.buffer_score))
        buffers = (y.gather(2, order[..., None].expand_as(y)) for y in (cache.buffer_k, cache.buffer_v))
        return o, cache.k, cache.v, cache.positions, cache.score, *in_order, *buffers

    ring = torch.arange(START - WINDOW - 1, START).roll(START % (WINDOW + 1)).expand(3, -1)
    others = {
        "starts": torch.full((3,), START),
        "ring_positions": ring,
        "buffer_positions": torch.tensor([0, 3, 4, 9]).expand(3, HEADS, -1),
    }
    return Case(
        call, wide(lengths, "q", "k", "v", groups=2) | rows(lengths, score=(HEADS,)) | LTE_CACHE, others, ("all",)
    )


def sparse(lengths: tuple[int, ...]) -> Case:
    sizes = (whole(lengths), 16, 4, 20)
    return Case(
        lambda x: native_sparse_attention(*(x[n] for n in "qkv"), x["gates"].abs(), *sizes)[:1],
        wide(lengths, "q", "k", "v", groups=2) | rows(lengths, gates=(2 * HEADS, 3)), {},
    )  # fmt: skip


def sparse_cached(lengths: tuple[int, ...], in_place: bool) -> Case:
    """Where not every block is selected, and the first token completes one."""
    held = (79, 79, 79)

    def call(x: Inputs) -> tuple[Tensor, ...]:
        cache = NSACache.empty(3, HEADS, DIM, 16, dtype=x["k"].dtype, device=DEVICE)
        cache = cache.append(x["held_k"], x["held_v"], whole(held))
        sequences = Sequences.of(lengths, DEVICE, x["starts"])
        inputs = (*(x[n] for n in "qkv"), x["gates"].abs(), cache, sequences, 16, 4, 20)
        o, cache = native_sparse_attention_with_cache(*inputs, in_place)
        return o, cache.k, cache.v, cache.pooled_k, cache.pooled_v

    shapes = (
        wide(lengths, "q", "k", "v", groups=2) | rows(lengths, gates=(2 * HEADS, 3)) | wide(held, "held_k", "held_v")
    )
    return Case(call, shapes, {"starts": torch.tensor(held)}, ("all",))


def windowed(x: Inputs) -> tuple[Tensor, ...]:
    cache = KeyValueCache(x["ring_k"], x["ring_v"], x["ring_positions"])
    o, cache = attention_with_cache(x["q"], x["k"], x["v"], cache, starting(x), WINDOW, in_place=True)
    return o, *astuple(cache)


def cross_entropy() -> Case:
    return Case(
        lambda x: linear_cross_entropy(x["x"], x["weight"], x["labels"], x["weights"], 0.1),
        rows(LENGTHS, x=(DIM,)) | {"weight": (40, DIM), "weights": (20,)},
        {"labels": torch.arange(20).where(torch.arange(20) != 3, -100)},
        ("weights",),
    )


POSITIONS = {"positions": torch.arange(20) * 1001}
FIRST = wide(LENGTHS, "k", "v") | ROUTER
CASES: dict[str, Case] = {
    "attention": Case(
        lambda x: (attention(x["q"], x["k"], x["v"], whole(), WINDOW),), wide(LENGTHS, "q", "k", "v", groups=2), {}
    ),
    "attention's step": Case(
        windowed,
        wide(STEP, "q", "k", "v", groups=2) | {f"ring_{n}": (3, HEADS, WINDOW, DIM) for n in "kv"},
        {"starts": torch.full((3,), 14), "ring_positions": torch.arange(7, 14).expand(3, -1)},
        ("all",),
    ),
    "convolution": convolution(LENGTHS, False),
    "convolution's step": convolution(STEP, True),
    "cross entropy": cross_entropy(),
    "delta rule": delta_rule(LENGTHS, False),
    "delta rule's step": delta_rule(STEP, True),
    "exits": Case(
        lambda x: (exit_positions(x["score"], whole(), 3, SINKS, 2),), rows(LENGTHS, score=(HEADS,)), {}, ("all",)
    ),
    "lte": lte(None),
    "lte with a buffer": lte(BUFFER),
    "lte's piece": lte_cached(LENGTHS, False),
    "lte's step": lte_cached(STEP, True),
    "nsa": sparse((2, 83)),
    "nsa's piece": sparse_cached((2, 30, 1), False),
    "nsa's step": sparse_cached(STEP, True),
    "norm": Case(lambda x: (rms_norm(x["x"], x["w"], 1e-6),), wide(LENGTHS, "x") | {"w": (DIM,)}, {}),
    "norm, gated": Case(
        lambda x: (gated_rms_norm(x["x"], x["gate"], x["w"], 1e-6),), wide(LENGTHS, "x", "gate") | {"w": (DIM,)}, {}
    ),
    "norm of a sum": Case(
        lambda x: add_rms_norm(x["x"], x["y"], x["w"], 1e-6), wide(LENGTHS, "x", "y") | {"w": (DIM,)}, {}
    ),
    "norm and a row's product": Case(
        lambda x: (add_rms_norm_gemv(x["x"], None, x["w"], 1e-6, x["weight"]),),
        {"x": (1, 24), "w": (24,), "weight": (10, 24)}, {}, ("all",),
    ),
    "gated norm and a row's product": Case(
        lambda x: (gated_rms_norm_gemv(x["x"], x["gate"], x["w"], 1e-6, x["weight"]),),
        {"x": (1, 3, 8), "gate": (1, 3, 8), "w": (8,), "weight": (10, 24)}, {}, ("all",),
    ),
    "swiglu and a row's product": Case(
        lambda x: (swiglu_gemv(x["gate"], x["up"], x["weight"]),),
        {"gate": (1, 24), "up": (1, 24), "weight": (10, 24)}, {}, ("all",),
    ),
    "rotary": Case(lambda x: (rotary(x["x"], x["positions"], 1e4),), wide(LENGTHS, "x"), POSITIONS),
    "router": Case(
        lambda x: retention_scores(x["k"], x["v"], parameters(x), whole(), Dropout(0.2, x["keys"])),
        FIRST, {"keys": torch.arange(20) * 7},
    ),
    "router's first piece": Case(lambda x: streamed(x, whole()), FIRST | router_states(3), {}, ("all",)),
    "router's step": Case(
        lambda x: streamed(x, starting(x)), wide(STEP, "k", "v") | ROUTER | router_states(3),
        {"starts": torch.tensor([3, 14, 8])}, ("all",),
    ),
    "swiglu": Case(lambda x: (swiglu(x["gate"], x["up"]),), rows(LENGTHS, gate=(24,), up=(24,)), {}),
}  # fmt: skip


# The kernels that overwrite a state, all else laid out as before.
STATES = {
    "attention's step": ("ring_k", "ring_v", "ring_positions"),
    "convolution's step": ("state",),
    "delta rule's step": ("state",),
    "lte's step": (*LTE_CACHE, "ring_positions", "buffer_positions"),
}
CASES |= {f"{name}, in place": replace(CASES[name], dense=states) for name, states in STATES.items()}


def sliced(x: Tensor) -> Tensor:
    """Every other one of every dimension, between NaN or numbers out of any range."""
    blank = float("nan") if x.is_floating_point() else 2**40
    memory = torch.full([2 * size + 1 for size in x.shape], blank, dtype=x.dtype, device=x.device)
    view = memory[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def rows_apart(x: Tensor) -> Tensor:
    """A part of wider rows, as of a fused projection."""
    blank = float("nan") if x.is_floating_point() else 2**40
    memory = torch.full([*x.shape[:-1], x.shape[-1] + 3], blank, dtype=x.dtype, device=x.device)
    return memory[..., : x.shape[-1]].copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The last dimension's values farthest apart."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def expanded(x: Tensor) -> Tensor:
    """All the same along the first dimension, in one place."""
    return x[:1].expand_as(x)


LAYOUTS = {layout.__name__: layout for layout in (sliced, rows_apart, transposed, expanded)}


def results(case: Case, inputs: Inputs, layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Outputs, then gradients for cotangents laid out likewise."""
    fixed = case.no_gradients
    wanted = [name for name in case.shapes if "all" not in fixed and name not in fixed]
    laid = {name: x if name in case.dense else layout(x) for name, x in inputs.items()}
    laid = {name: x.detach().requires_grad_(name in wanted) for name, x in laid.items()}
    if not wanted:
        with torch.no_grad():
            return list(case.call(laid))
    outputs = case.call(laid)
    graded = [y for y in outputs if y.requires_grad]
    cotangents = [torch.cos(torch.arange(y.numel(), device=y.device) + 1.0).view(y.shape) for y in graded]
    cotangents = [layout(x) if x.dim() else x for x in cotangents]
    found = torch.autograd.grad(graded, [laid[name] for name in wanted], cotangents)
    return [y.detach() for y in outputs] + list(found)


# What these two prepare for their kernels others do, too.
FEW = {("sliced", name) for name in CASES if name not in ("lte with a buffer", "lte's piece", "nsa's piece")}


@pytest.mark.parametrize("layout, name", interpreted(FEW, [(layout, name) for layout in LAYOUTS for name in CASES]))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_inputs_give_what_contiguous_ones_do(backend, layout, name, monkeypatch):
    case, lay = CASES[name], LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    inputs = {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in case.shapes.items()} | case.others
    inputs = {n: x.to(DEVICE) for n, x in inputs.items()}
    # The same values, which `expanded` alone changes; an op may overwrite what it is given.
    inputs = {n: x.contiguous() for n, x in inputs.items()}
    expected = results(case, {n: x.clone() for n, x in inputs.items()}, lambda x: lay(x).contiguous())
    if DEVICE == "cpu" and backend == "triton":
        for op in DISPATCHERS:
            monkeypatch.setattr(importlib.import_module(f"megahybrid_kernels.{op}"), "takes_triton", lambda *_: True)
    found = results(case, inputs, lay)
    assert len(found) == len(expected)
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=lambda m, n=number: f"result {n}: {m}")
