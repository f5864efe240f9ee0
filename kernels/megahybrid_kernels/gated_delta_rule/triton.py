"""The gated delta rule in Triton: the launches and the autograd function.

Forward: `prepare_kernel` for all chunks at once, then `scan_kernel` from chunk to chunk. Backward: `scan_kernel` again,
which now leaves every chunk's state and u; `reverse_scan_kernel`; `gradient_kernel` and `gate_gradient_kernel` for all
chunks at once. Of few long sequences the scans go segment by segment, all at once, after `join_kernel` has found the
states between them. At a border (see `border`) the maps of the rows before and behind are joined in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.gated_delta_rule.border import Border
from megahybrid_kernels.gated_delta_rule.triton_backward import PART_KINDS, gate_gradient_kernel, gradient_kernel
from megahybrid_kernels.gated_delta_rule.triton_plan import Plan, Tuning, longest_segment, plan, rows_between, tuning
from megahybrid_kernels.gated_delta_rule.triton_prepare import ROW_KINDS, prepare_kernel
from megahybrid_kernels.gated_delta_rule.triton_scan import join_kernel, reverse_scan_kernel, scan_kernel
from megahybrid_kernels.integers import cdiv, tile_width
from megahybrid_kernels.sequences import Sequences
from megahybrid_kernels.targets import table_of
from megahybrid_kernels.tuning import Launch
from megahybrid_kernels.untracked import applied

# Keys of a tile of `gradient_kernel` at least: with 32 what Triton 3.6 compiles for Hopper is wrong.
_NARROWEST = 64


@dataclass(frozen=True)
class _Call:
    """The inputs as the kernels take them, and what all launches need to know of them; `strongest`: beta's bound."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor
    plan: Plan
    tune: Tuning
    strongest: float

    @property
    def tokens(self) -> int:
        return self.v.shape[0]

    @property
    def heads(self) -> int:
        return self.v.shape[1]

    @property
    def key_dim(self) -> int:
        return self.k.shape[2]

    @property
    def value_dim(self) -> int:
        return self.v.shape[2]

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5

    def strides(self, *names: str) -> list[int]:
        return [stride for name in names for stride in getattr(self, name).stride()[:2]]

    @property
    def row_type(self) -> tl.dtype:
        """Of the scans' row numbers: 64 bits, which cost them registers, only where offsets need them."""
        farthest = max(self.heads * self.value_dim, *(x.stride(0) for x in (self.q, self.k, self.v)))
        return tl.int64 if (self.tokens + 256) * farthest >= 2**31 else tl.int32

    def state_shape(self, count: int, value_dim: int | None = None) -> tuple[int, ...]:
        return count, self.heads, self.key_dim, value_dim or self.value_dim

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.v.device)

    @property
    def precision(self) -> str:
        return table_of(self.v.device).precise if self.v.dtype == torch.float32 else "tf32"

    def heads_constants(self) -> dict[str, object]:
        """constexpr arguments that all kernels over chunks share."""
        sizes = {"HEADS": self.heads, "GROUPS": self.heads // self.k.shape[1], "KEY_DIM": self.key_dim}
        return sizes | {"WIDTH": tile_width(self.key_dim), "CHUNK": self.tune.chunk, "PRECISION": self.precision}

    def columns(self, launch: Launch, value_dim: int | None = None) -> dict[str, object]:
        """constexpr arguments of the values, and the launch's options."""
        value_dim = value_dim or self.value_dim
        columns = max(16, min(launch.size, tile_width(value_dim)))
        return {"VALUE_DIM": value_dim, "COLUMNS": columns} | launch.options()

    def programs(self, columns: dict[str, object], states: int) -> int:
        """Of a kernel with these `columns`, for so many states of each head."""
        return cdiv(columns["VALUE_DIM"], columns["COLUMNS"]) * self.heads * states


@dataclass(frozen=True)
class _Prepared:
    """What `prepare_kernel` leaves; rest, what bf16 takes from T, for training alone."""

    rows: Tensor
    ends: Tensor
    inverse: Tensor
    rest: Tensor | None
    attention: Tensor


def _prepare(call: _Call, training: bool) -> _Prepared:
    count, dtype = len(call.plan.chunks), call.v.dtype
    square = (count, call.heads, call.tune.chunk, call.tune.chunk)
    prepared = _Prepared(
        call.empty(count, call.heads, ROW_KINDS.value, call.tune.chunk),
        call.empty(count, call.heads),
        call.empty(*square, dtype=dtype),
        call.empty(*square, dtype=dtype) if dtype == torch.bfloat16 and training else None,
        call.empty(*square, dtype=dtype),
    )
    prepare_kernel[call.heads * count](
        call.q, call.k, call.a, call.b, call.A_log, call.dt_bias, prepared.rows, prepared.ends, prepared.inverse,
        prepared.rest, prepared.attention, call.plan.chunks, *call.strides("q", "k", "a", "b"), call.scale,
        **call.heads_constants(), DOT=tl.float32 if dtype == torch.float32 else tl.float16,
        COLUMNS=min(call.tune.prepare.size, tile_width(call.key_dim)), STRONGEST=call.strongest,
        **call.tune.prepare.options(),
    )  # fmt: skip
    return prepared


def _scan(
    call: _Call,
    prepared: _Prepared,
    launch: Launch,
    initial: Tensor | None = None,
    o: Tensor | None = None,
    u: Tensor | None = None,
    states: Tensor | None = None,
    final: Tensor | None = None,
    transfer: bool = False,
) -> None:
    values = call.columns(launch, call.key_dim if transfer else None)
    scan_kernel[call.programs(values, len(call.plan.segments))](
        call.q, call.k, None if transfer else call.v, prepared.rows, prepared.ends, prepared.inverse,
        prepared.rest if o is None else None, prepared.attention, initial, o, u, states, final, call.plan.segments,
        *call.strides("q", "k", "v"), **call.heads_constants(), **values, ROW=call.row_type,
    )  # fmt: skip


def _reverse_scan(
    call: _Call,
    prepared: _Prepared,
    do: Tensor,
    dfinal: Tensor | None,
    dv: Tensor | None = None,
    dstates: Tensor | None = None,
    dinitial: Tensor | None = None,
) -> None:
    values = call.columns(call.tune.reverse)
    reverse_scan_kernel[call.programs(values, len(call.plan.segments))](
        call.q, call.k, do, prepared.rows, prepared.ends, prepared.inverse, prepared.rest, prepared.attention,
        dfinal, dv, dstates, dinitial, call.plan.segments, *call.strides("q", "k"), **call.heads_constants(), **values,
        ROW=call.row_type,
    )  # fmt: skip


@lru_cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _at_once(device: torch.device, first: Callable[[], None], second: Callable[[], None]) -> None:
    """Two launches that need nothing of each other: a scan alone leaves most of a multiprocessor idle."""
    if device.type != "cuda":
        first(), second()
        return
    current, beside = torch.cuda.current_stream(device), _second_stream(device)
    beside.wait_stream(current)
    first()
    with torch.cuda.stream(beside):
        second()
    # What the second stream used is freed, and taken again, in the order of the first.
    current.wait_stream(beside)


def _join(
    call: _Call, transfer: Tensor, own: Tensor, start: Tensor | None, last: Tensor, bounds: Tensor, reverse: bool
) -> Tensor:
    """fp32, as `own`: the state that each segment of the sequences in `bounds` starts from; fills `last`."""
    states, values = torch.empty_like(own), call.columns(call.tune.join, own.shape[3])
    width = tile_width(call.key_dim)
    join_kernel[call.programs(values, len(last))](
        transfer, own, start, states, last, bounds, HEADS=call.heads, KEY_DIM=call.key_dim,
        WIDTH=width, ROWS=min(64, width, 8192 // width), REVERSE=reverse, PRECISION=table_of(call.v.device).precise,
        **values,
    )  # fmt: skip
    return states


def _from_rows_before(
    call: _Call, transfer: Tensor, own: Tensor, border: Border
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """The states before the sequences, and of every row M `[rows, heads, Dk, Dk]` and B of its last sequence."""
    key_dim, value_dim, count = call.key_dim, call.value_dim, call.plan.last
    transfer, own = transfer[-count:], own[-count:]
    whole = torch.eye(key_dim, key_dim + value_dim, device=own.device).expand(1, call.heads, -1, -1).contiguous()
    last = torch.empty_like(whole)
    wide = torch.cat([torch.zeros_like(transfer), own], 3)
    _join(call, transfer, wide, whole, last, rows_between(0, count, own.device), reverse=False)
    maps, rests = (x.contiguous() for x in border.gather(last[0]).split([key_dim, value_dim], 3))
    if border.first == border.number:
        return None, (maps, rests)
    initial = own.new_zeros(call.state_shape(len(call.plan.bounds) - 1))
    between = rows_between(border.first, border.number, own.device)
    _join(call, maps, rests, None, initial[:1], between, reverse=False)
    return initial, (maps, rests)


def _from_rows_behind(call: _Call, transfer: Tensor, own: Tensor, maps: Tensor, border: Border) -> Tensor | None:
    """The gradients of the states after the sequences."""
    first = call.empty(*call.state_shape(1))
    _join(call, transfer, own, None, first, call.plan.bounds[:2], reverse=True)
    firsts = border.gather(first[0])
    if border.last == border.number:
        return None
    dfinal = own.new_zeros(call.state_shape(len(call.plan.bounds) - 1))
    between = rows_between(border.number + 1, border.last + 1, own.device)
    _join(call, maps, firsts, None, dfinal[-1:], between, reverse=True)
    return dfinal


class _GatedDeltaRule(torch.autograd.Function):
    """Saves the inputs, what `prepare_kernel` left, and the states between segments."""

    @staticmethod
    def forward(
        ctx, q, k, v, a, b, A_log, dt_bias, initial, cut: Plan, count: int, tune: Tuning, training: bool,
        output_final_state: bool, strongest: float, border: Border | None,
    ):  # fmt: skip
        call = _Call(q, k, v, a, b, A_log, dt_bias, cut, tune, strongest)
        prepared = _prepare(call, training)
        # The states between segments pass through `final`, which is small beside them.
        asked = output_final_state or cut.bounds is not None
        final = call.empty(*call.state_shape(count)) if asked else None
        o, starts, transfer, maps = torch.empty(*v.shape, dtype=v.dtype, device=v.device), initial, None, None
        if cut.bounds is not None:
            segments = len(cut.segments)
            own = call.empty(*call.state_shape(segments))
            transfer = call.empty(*call.state_shape(segments, call.key_dim))
            _at_once(
                v.device,
                partial(_scan, call, prepared, tune.states, final=own),
                partial(_scan, call, prepared, tune.states, final=transfer, transfer=True),
            )
            before = initial
            if border is not None:
                before, (maps, _) = _from_rows_before(call, transfer, own, border)
            starts = _join(call, transfer, own, before, final, cut.bounds, reverse=False)
        _scan(call, prepared, tune.scan, starts, o=o, final=final if cut.bounds is None else None)
        ctx.save_for_backward(
            q, k, v, a, b, A_log, dt_bias, initial, starts, transfer, maps,
            prepared.rows, prepared.ends, prepared.inverse, prepared.rest, prepared.attention,
        )  # fmt: skip
        ctx.cut, ctx.tune, ctx.strongest, ctx.border = cut, tune, strongest, border
        ctx.set_materialize_grads(False)
        return o, final if output_final_state else None

    @staticmethod
    def backward(ctx, do: Tensor | None, dfinal: Tensor | None):
        *inputs, initial, starts, transfer, maps, rows, ends, inverse, rest, attention = ctx.saved_tensors
        call = _Call(*inputs, ctx.cut, ctx.tune, ctx.strongest)
        prepared = _Prepared(rows, ends, inverse, rest, attention)
        tune, bounds = ctx.tune, ctx.cut.bounds
        do = torch.zeros_like(call.v) if do is None else do
        do, dfinal = do.contiguous(), dfinal if dfinal is None else dfinal.contiguous()
        u, dv = (call.empty(*call.v.shape, dtype=call.v.dtype) for _ in range(2))
        count, shape = len(ctx.cut.chunks), (call.heads, call.value_dim, call.key_dim)
        states, dstates = (call.empty(count, *shape, dtype=call.v.dtype) for _ in range(2))
        count = len(ctx.cut.segments) if bounds is None else len(bounds) - 1
        dinitial = None if initial is None and bounds is None else call.empty(*call.state_shape(count))
        if bounds is None:
            first = partial(_reverse_scan, call, prepared, do, dfinal, dv, dstates, dinitial)
        else:
            own = call.empty(*call.state_shape(len(ctx.cut.segments)))
            first = partial(_reverse_scan, call, prepared, do, None, dinitial=own)
        _at_once(do.device, first, partial(_scan, call, prepared, tune.states, starts, u=u, states=states))
        if bounds is not None:
            if ctx.border is not None:
                dfinal = _from_rows_behind(call, transfer, own, maps, ctx.border)
            ends_of = _join(call, transfer, own, dfinal, dinitial, bounds, reverse=True)
            _reverse_scan(call, prepared, do, ends_of, dv, dstates)
        grads = _gradients(call, prepared, do, u, dv, states, dstates)
        return *grads, None if initial is None else dinitial.to(initial.dtype), *[None] * 7


def _gradients(
    call: _Call, prepared: _Prepared, do: Tensor, u: Tensor, dv: Tensor, states: Tensor, dstates: Tensor
) -> tuple[Tensor, ...]:
    """Of q, k, v, a, b, A_log and dt_bias."""
    count, chunk, dtype, launch = len(call.plan.chunks), call.tune.chunk, call.v.dtype, call.tune.gradient
    dq, dk = (call.empty(call.tokens, call.heads, call.key_dim, dtype=dtype) for _ in range(2))
    parts = call.empty(count, call.heads, PART_KINDS.value, chunk)
    gradient_kernel[2 * call.heads * count](
        call.q, call.k, prepared.rows, prepared.ends, prepared.attention, do, u, dv, states, dstates, parts, dq, dk,
        call.plan.chunks, *call.strides("q", "k"), call.scale, WARPS=launch.warps,
        **call.heads_constants() | {"WIDTH": max(_NARROWEST, tile_width(call.key_dim))},
        **call.columns(launch) | {"COLUMNS": launch.size},
    )  # fmt: skip
    da, db = (call.empty(*x.shape, dtype=x.dtype) for x in (call.a, call.b))
    sums = call.empty(2, count, call.heads)
    gate_gradient_kernel[call.heads * count](
        call.a, call.b, call.A_log, call.dt_bias, parts, da, db, sums, call.plan.chunks, *call.strides("a", "b"),
        HEADS=call.heads, CHUNK=chunk, STRONGEST=call.strongest, num_warps=1,
    )  # fmt: skip
    if call.heads != call.k.shape[1]:
        dq, dk = (x.unflatten(1, (call.k.shape[1], -1)).sum(2) for x in (dq, dk))
    dA_log, ddt_bias = sums.sum(1).to(torch.promote_types(call.A_log.dtype, call.dt_bias.dtype))
    return dq, dk, dv, da, db, dA_log.to(call.A_log.dtype), ddt_bias.to(call.dt_bias.dtype)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    sequences: Sequences,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    allow_neg_eigval: bool = False,
    border: Border | None = None,
    *,
    tune: Tuning | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `megahybrid_kernels.gated_delta_rule`; float32, bfloat16 or float16, head dims up to 256.

    tune: launches for benchmarks; fixed by head dims, dtype and GPU when left out.
    """
    q, k = (x.to(v.dtype) for x in (q, k))
    q, k, v = map(dense_rows, (q, k, v))
    A_log, dt_bias = A_log.contiguous(), dt_bias.contiguous()
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    tune = tune or tuning(max(k.shape[2], v.shape[2]), v.dtype, v.device)
    training = torch.is_grad_enabled()
    longest = longest_segment(sequences.lengths, v.shape[1], v.shape[2], tune, training)
    cut = plan(sequences.lengths, tune.chunk, longest, v.device, joined=border is not None)
    strongest = 2.0 if allow_neg_eigval else 1.0
    return applied(
        _GatedDeltaRule, q, k, v, a, b, A_log, dt_bias, initial_state, cut, sequences.count, tune, training,
        output_final_state, strongest, border,
    )  # fmt: skip
