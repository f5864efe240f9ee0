"""Every launch of every op at sizes that no test has the memory for, and what of its addresses can pass 32 bits.

Run as a program, with Triton's compiler in place of its interpreter: the ops' host code meets tensors that have shapes
and strides but no memory, a launch compiles the kernel to Triton's IR (for sm_90; no GPU is needed) and hands it to
`ttir_ranges`. Prints JSON: `kernels`, all there are, and `launches` by case: kernel, grid, faults.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton.compiler
from compiled import Driver
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from ttir_ranges import Ranges

import megahybrid_kernels
from megahybrid_kernels import Sequences
from megahybrid_kernels.attention.triton_decode import attention_step
from megahybrid_kernels.causal_conv1d import triton as conv
from megahybrid_kernels.causal_conv1d.triton_step import causal_conv1d_step
from megahybrid_kernels.counter_dropout.triton import dropout_keys
from megahybrid_kernels.exit_positions.triton import exit_positions
from megahybrid_kernels.gated_delta_rule import Border
from megahybrid_kernels.gated_delta_rule import triton as gdn
from megahybrid_kernels.gated_delta_rule.triton_step import gated_delta_rule_step
from megahybrid_kernels.gemv import triton as gemv
from megahybrid_kernels.launch import Kernel
from megahybrid_kernels.linear_cross_entropy import triton as cross_entropy
from megahybrid_kernels.lte_attention import LTECache
from megahybrid_kernels.lte_attention import triton as lte
from megahybrid_kernels.lte_attention.triton_decode import lte_attention_step
from megahybrid_kernels.lte_attention.triton_prefill import lte_attention_piece
from megahybrid_kernels.native_sparse_attention import NSACache, triton_score
from megahybrid_kernels.native_sparse_attention import triton as nsa
from megahybrid_kernels.native_sparse_attention.triton_decode import native_sparse_attention_step
from megahybrid_kernels.native_sparse_attention.triton_prefill import native_sparse_attention_piece
from megahybrid_kernels.norm import triton as norm
from megahybrid_kernels.retention_router import Dropout, RouterParameters, RouterState
from megahybrid_kernels.retention_router import triton as router
from megahybrid_kernels.retention_router.triton_prefill import retention_scores_first
from megahybrid_kernels.retention_router.triton_step import retention_scores_step
from megahybrid_kernels.rotary import triton as rotary
from megahybrid_kernels.swiglu import triton as swiglu

TARGET = GPUTarget("cuda", 90, 32)
BF16 = torch.bfloat16


def to_ttir(source, target: GPUTarget, options: dict, **_) -> tuple[str, list[str]]:
    """In place of `triton.compiler.compile`: the IR, and the names of its arguments."""
    backend = triton.compiler.make_backend(target)
    parsed, context = backend.parse_options(options), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = source.make_ir(target, parsed, implementation, modules, context)
    backend.make_ttir(module, {}, parsed, TARGET.arch)
    return module.str_nodebug(), [name for name, kind in source.signature.items() if kind != "constexpr"]


class Recorder:
    """Stands in for launches; `most` bounds what kernels load and count."""

    def __init__(self):
        self.most, self.launches = 0, []

    def getitem(self, function: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args, **options) -> None:
            ttir, names = function.run(*args, grid=grid, warmup=True, **options)
            assert f"@{function.repr(None)}(" in ttir  # what profiles show
            assert len(args) == sum(not x.is_constexpr for x in function.params), "constants come by name"
            values = dict(zip(function.arg_names, args, strict=False)) | options
            integers = {n: values[name] for n, name in enumerate(names) if isinstance(values[name], int)}
            faults = Ranges(ttir, integers, grid, self.most).faults
            self.launches.append((function.fn.__module__ + "." + function.fn.__name__, grid, sorted(faults)))

        return launch


def new(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def far_rows(tokens: int, *rest: int) -> Tensor:
    """Rows as far apart as `dense_rows` leaves them."""
    strides = (2**25 - 8, *new(*rest).stride())
    return torch.empty_strided((tokens, *rest), strides, dtype=BF16, device="meta", requires_grad=True)


def far_heads(tokens: int, heads: int, dim: int) -> Tensor:
    """`[heads, tokens, dim]` in memory."""
    return new(heads, tokens, dim, grad=False).transpose(0, 1).requires_grad_()


@dataclass(frozen=True)
class Case:
    """Sizes of one call of every op; `make` lays out what has rows of heads, `most` is as of `ttir_ranges`, the tokens
    and some blocks when left out."""

    lengths: tuple[int, ...]
    heads: int
    dim: int
    make: Callable[..., Tensor] = new
    groups: int = 1
    most: int | None = None

    @cached_property
    def sequences(self) -> Sequences:
        return Sequences.of(self.lengths, "meta")

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def rows(self, heads: int = 0) -> Tensor:
        return self.make(self.tokens, heads or self.heads, self.dim)

    def router(self) -> RouterParameters:
        channels = [2 * self.dim >> layer for layer in range(4)]
        weights = tuple(new(self.heads * channels[n + 1], channels[n], 3) for n in range(3))
        biases = tuple(new(self.heads * channels[n + 1]) for n in range(3))
        return RouterParameters(weights, biases, new(self.heads, channels[3]), new(self.heads))


def backward(*outputs: Tensor) -> None:
    sum(x.float().sum() for x in outputs).backward()


def delta_rule_inputs(case: Case) -> list[Tensor]:
    rows = [case.rows() for _ in range(3)] + [new(case.tokens, case.heads) for _ in range(2)]
    return rows + [new(case.heads, dtype=torch.float32) for _ in range(2)]


def delta_rule(case: Case, tune: gdn.Tuning | None = None) -> None:
    state = new(len(case.lengths), case.heads, case.dim, case.dim, dtype=torch.float32)
    outputs = gdn.gated_delta_rule(*delta_rule_inputs(case), case.sequences, state, True, tune=tune)
    if torch.is_grad_enabled():
        backward(*outputs)


def delta_rule_in_segments(case: Case) -> None:
    delta_rule(case, replace(gdn.tuning(case.dim, BF16, torch.device("meta")), programs=10**9, shortest=1, whole=0))


def delta_rule_at_a_border(case: Case) -> None:
    """The second of three rows that follow each other, in a sequence that begins before and ends behind it."""
    border = Border(1, 0, 2, lambda x: x.new_empty(3, *x.shape))
    o, _ = gdn.gated_delta_rule(*delta_rule_inputs(case), case.sequences, border=border)
    backward(o)


@torch.no_grad()
def delta_rule_forward(case: Case) -> None:
    delta_rule(case)
    delta_rule_in_segments(case)


def attention(case: Case, buffer: int | None) -> None:
    q, k, v, score = case.rows(case.heads * case.groups), case.rows(), case.rows(), new(case.tokens, case.heads)
    for gate in ("value", "displacing"):
        backward(lte.lte_attention(q, k, v, score, case.sequences, 768, 4, buffer, gate))


def sparse_attention(case: Case, num_blocks: int) -> None:
    q, k, v = case.rows(case.heads * case.groups), case.rows(), case.rows()
    gates = new(case.tokens, case.heads * case.groups, 3)
    sizes = (case.sequences, 16, num_blocks)
    backward(nsa.native_sparse_attention(q, k, v, gates, *sizes, 512)[0])
    nsa.select_blocks(q, k, *sizes, (0, case.tokens))


def evictions(case: Case) -> None:
    exit_positions(new(case.tokens, case.heads), case.sequences, 768, 4, 512)


def retention(case: Case) -> None:
    samples, positions = (new(case.tokens, dtype=torch.int64, grad=False) for _ in range(2))
    dropout = Dropout(0.1, dropout_keys(samples, positions, 0, 1, 48)[-1])
    backward(*router.retention_scores(case.rows(), case.rows(), case.router(), case.sequences, dropout))


def convolution(case: Case) -> None:
    channels = case.heads * case.dim
    x = case.make(case.tokens, channels) if case.make is far_rows else new(case.tokens, channels)
    backward(*conv.causal_conv1d(x, new(channels, 4), case.sequences, new(len(case.lengths), 3, channels), True))


def elementwise(case: Case) -> None:
    backward(*norm.add_rms_norm(case.rows(), case.rows(), new(case.dim), 1e-6))
    backward(norm.gated_rms_norm(case.rows(), case.rows(), new(case.dim), 1e-6))
    backward(rotary.rotary(case.rows(), new(case.tokens, dtype=torch.int64, grad=False), 1e4))
    backward(swiglu.swiglu(case.rows(), case.rows()))
    vocabulary = 128_000
    logits, labels = new(case.tokens, vocabulary, grad=False), new(case.tokens, dtype=torch.int64, grad=False)
    weights = new(case.tokens, dtype=torch.float32, grad=False)
    cross_entropy.statistics_and_gradient_(logits, labels, weights, 0.0, True)


@torch.no_grad()
def prefill(case: Case) -> None:
    retention_scores_first(case.rows(), case.rows(), case.router(), case.sequences)
    cache = LTECache.empty(len(case.lengths), case.heads, case.dim, 768, 512, dtype=BF16, device="meta")
    q, k, v, score = case.rows(case.heads * case.groups), case.rows(), case.rows(), new(case.tokens, case.heads)
    starts = new(len(case.lengths), dtype=torch.int64, grad=False)
    for sequences in (case.sequences, Sequences.of(case.lengths, "meta", starts)):
        lte_attention_piece(q, k, v, score, cache, sequences, 768, 4, 512, 6)


@torch.no_grad()
def decode(case: Case, window: int = 768) -> None:
    """One token of each of as many sequences as there are tokens."""
    count, heads, dim = case.tokens, case.heads, case.dim
    positions, gates = new(count, dtype=torch.int64, grad=False), [new(count, heads) for _ in range(2)]
    state = new(count, heads, dim, dim, dtype=torch.float32)
    q, k, v = (case.rows() for _ in range(3))
    gated_delta_rule_step(q, k, v, *gates, new(heads), new(heads), state)
    causal_conv1d_step(new(count, heads * dim), new(heads * dim, 4), new(count, 3, heads * dim))
    parameters = case.router()
    retention_scores_step(k, v, parameters, positions, RouterState.empty(count, parameters), 2)
    cache = LTECache.empty(count, heads, dim, window, 512, dtype=BF16, device="meta")
    q = case.rows(heads * case.groups)
    lte_attention_step(q, k, v, gates[0], cache, positions, 4, 6)
    attention_step(q, k, v, *(new(count, heads, window, dim) for _ in range(2)), positions)
    cache = NSACache.empty(count, heads, dim, 16, dtype=BF16, device="meta").with_room(window)
    x, gates = new(count, heads, dim), new(count, heads * case.groups, 3)
    native_sparse_attention_step(q, x, x, gates, cache, positions, 16, 512)
    native_sparse_attention_step(x, x, x, gates[:, :heads], cache, positions, 16, 512, q)


@torch.no_grad()
def one_row(case: Case) -> None:
    """A token's row times a matrix of as many rows as there are tokens."""
    hidden, row = case.heads * case.dim, new(1, 1, case.heads * case.dim)
    weight, norm = new(case.tokens, hidden), new(hidden)
    for residual, total in ((None, None), (row, new(1, 1, hidden))):
        gemv.add_rms_norm_gemv(row, residual, norm, 1e-6, weight, total)
    gemv.swiglu_gemv(row, row, weight)
    heads = row.view(1, case.heads, case.dim)
    gemv.gated_rms_norm_gemv(heads, heads, new(case.dim), 1e-6, weight)


@torch.no_grad()
def sparse_prefill(case: Case) -> None:
    cache = NSACache.empty(1, case.heads, case.dim, 16, dtype=BF16, device="meta").with_room(case.most)
    q, k, gates = case.rows(case.heads * case.groups), case.rows(), new(case.tokens, case.heads, 3)
    cache = NSACache((case.most - case.tokens,), cache.room)
    native_sparse_attention_piece(k, k, k, gates, cache, case.sequences, 16, 16, 512, q)


TRAINING = (
    delta_rule, delta_rule_in_segments, partial(attention, buffer=None), partial(attention, buffer=512), evictions,
    partial(sparse_attention, num_blocks=16), retention, convolution, elementwise,
)  # fmt: skip
CASES: dict[str, tuple[Case, tuple[Callable[[Case], None], ...]]] = {
    "many tokens": (Case((1_200_000,), 8, 256), (delta_rule, delta_rule_in_segments, one_row)),
    "very many tokens": (Case((2**24 + 1000,), 8, 256, groups=2), (*TRAINING, delta_rule_at_a_border)),
    # The scans' row numbers have 32 bits up to here.
    "just enough tokens": (Case((2**20 - 257,), 8, 256, most=2**20 - 257), (delta_rule_forward,)),
    "many documents": (Case((1,) * 70_000, 8, 256, groups=2), TRAINING),
    "many cached documents": (Case((1,) * 70_000, 8, 256, groups=2, most=2**27), (prefill, decode)),
    "documents longer than a window": (Case((1500,) * 2000, 8, 256, groups=2), (*TRAINING, prefill)),
    "many heads": (Case((3, 1), 70_000, 16), TRAINING),
    "many cached heads": (Case((3, 1), 70_000, 16, most=2**13), (prefill, decode)),
    "far rows": (Case((5000,), 8, 256, far_rows, groups=2), TRAINING),
    "far heads": (Case((1_200_000,), 8, 256, far_heads, groups=8), TRAINING),
    "a long cache": (Case((256,), 8, 256, groups=2, most=2**24), (sparse_prefill,)),
    "a wide window": (Case((1, 1), 8, 256, groups=2, most=2**25), (partial(decode, window=2**24),)),
}


def kernels() -> list[str]:
    """Names of all there are."""
    names = set()
    for module in pkgutil.walk_packages(megahybrid_kernels.__path__, "megahybrid_kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Kernel):
                names.add(value.jit.fn.__module__ + "." + value.jit.fn.__name__)
    return sorted(names)


def main() -> None:
    driver.set_active(Driver(f"sm_{TARGET.arch}"))
    triton.compiler.compile = to_ttir
    # All scores at once: else a document of millions of tokens takes thousands of launches that are all the same.
    triton_score._SCORES = 2**60
    recorder, launches = Recorder(), {}
    JITFunction.__getitem__ = lambda function, grid: recorder.getitem(function, grid)
    for name, (case, ops) in CASES.items():
        recorder.most, recorder.launches = case.most or case.tokens + 512, []
        for op in ops:
            op(case)
        launches[name] = recorder.launches
    print(json.dumps({"kernels": kernels(), "launches": launches}))


if __name__ == "__main__":
    main()
