"""The gated delta rule in Triton: launches, how sequences are cut, and the autograd function.

Forward: `prepare_kernel` for all chunks at once, then `scan_kernel` from chunk to chunk. Backward: `scan_kernel` again,
which now leaves every chunk's state and u; `reverse_scan_kernel`; `gradient_kernel` and `gate_gradient_kernel` for all
chunks at once. Of few long sequences the scans go segment by segment, all at once, after `join_kernel` has found the
states between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.gated_delta_rule.triton_backward import PART_KINDS, gate_gradient_kernel, gradient_kernel
from megahybrid_kernels.gated_delta_rule.triton_prepare import ROW_KINDS, prepare_kernel
from megahybrid_kernels.gated_delta_rule.triton_scan import join_kernel, reverse_scan_kernel, scan_kernel
from megahybrid_kernels.integers import cdiv, next_power_of_2, tile_width
from megahybrid_kernels.sequences import Sequences

# Keys of a tile of `gradient_kernel` at least: with 32 what Triton 3.6 compiles for Hopper is wrong.
_NARROWEST = 64


@dataclass(frozen=True)
class Launch:
    """One kernel's tile and how it is compiled.

    Attributes:
        columns: of the values (in `prepare` of the keys) that a program, or a step of its loop, owns.
        warps, stages: Triton's num_warps and num_stages.
        registers: a thread's at most; None is the compiler's choice.
    """

    columns: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """What every launch takes."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


@dataclass(frozen=True)
class Tuning:
    """Launches of all kernels, and what is cut or kept.

    Attributes:
        prepare, scan, recompute, reverse, gradient, join: the launches; `recompute` is the scan in backward.
        chunk: tokens of a chunk.
        programs: a scan is cut into segments until about so many programs run; sequences alone suffice from half of it.
        shortest: chunks of a segment at least.
        keep_states: the forward saves states and u, so that backward need not scan for them.
    """

    prepare: Launch
    scan: Launch
    recompute: Launch
    reverse: Launch
    gradient: Launch
    join: Launch
    chunk: int = 64
    programs: int = 128
    shortest: int = 16
    keep_states: bool = False


def tuning(width: int, dtype: torch.dtype) -> Tuning:
    """Fixed by the wider head dim and the dtype, so that all ranks and lengths run the same code."""
    if dtype == torch.float32:
        # Every product is three of tf32, whose operands are kept in two parts each.
        scan, chunk = (Launch(16, 4, 1), 32) if width > 128 else (Launch(32, 4, 1), 64)
        # Four warps: Triton gives eight the rows of a tile twice as high, and their products read what is not there.
        gradient = Launch(16, 4, 1)
        return Tuning(Launch(32, 4, 1), scan, scan, scan, gradient, Launch(16, 4, 1), chunk)
    if width <= 128:
        scan = Launch(64, 4, 3)
        # Two programs fit an SM in reverse, where more products wait for each other, and of the gradients.
        return Tuning(Launch(64, 4, 1, 128), scan, scan, Launch(32, 4, 2), Launch(64, 4, 3), Launch(16, 4, 2))
    scan = Launch(64, 8, 2)
    return Tuning(Launch(64, 4, 1, 128), scan, scan, scan, Launch(64, 8, 4), Launch(16, 4, 2))


@dataclass(frozen=True)
class Plan:
    """How a packing is cut, as int32 tensors on the device.

    Attributes:
        chunks: `[chunks, 2]`, first row and the row after the last.
        segments: `[segments, 3]`, the same of a segment, and its first chunk.
        bounds: `[sequences + 1]`, each sequence's first segment; None where segments are sequences.
    """

    chunks: Tensor
    segments: Tensor
    bounds: Tensor | None


def _pieces(begins: Tensor, lengths: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """First rows and rows after the last of pieces of at most `size` rows, and `[n + 1]` the first piece of each."""
    counts = (lengths + size - 1) // size
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    owner = torch.repeat_interleave(counts)
    starts = begins[owner] + (torch.arange(len(owner)) - first[owner]) * size
    return starts, torch.minimum(starts + size, (begins + lengths)[owner]), first


@lru_cache(maxsize=16)
def plan(lengths: tuple[int, ...], chunk: int, longest: int, device: torch.device) -> Plan:
    """The plan with segments of at most `longest` chunks, made on the host once for all layers that share a packing."""
    # Out of inference mode, because a plan first made during evaluation is saved for backward by later training.
    with torch.inference_mode(False):
        length = torch.tensor(lengths)
        begin = length.cumsum(0) - length
        starts, stops, first = _pieces(begin, length, chunk)
        chunks, segments, bounds = torch.stack([starts, stops], 1), [begin, begin + length, first[:-1]], None
        if max(lengths) > longest * chunk:
            starts, stops, bounds = _pieces(begin, length, longest * chunk)
            owner = torch.repeat_interleave(bounds.diff())
            segments = [starts, stops, first[owner] + (starts - begin[owner]) // chunk]
        tensors = (chunks, torch.stack(segments, 1), bounds)
        moved = (x if x is None else x.to(torch.int32).to(device, non_blocking=True) for x in tensors)
        return Plan(*moved)


def longest_segment(lengths: tuple[int, ...], heads: int, value_dim: int, tune: Tuning) -> int:
    """Chunks of a segment: a power of two, so that few plans differ."""
    # Programs that one sequence gives.
    columns_programs = heads * cdiv(value_dim, min(tune.scan.columns, tile_width(value_dim)))
    chunks = [cdiv(length, tune.chunk) for length in lengths]
    longest = next_power_of_2(max(chunks))
    # The scan takes as long as its longest sequence: short ones beside it do not help.
    if 2 * len([1 for x in chunks if 2 * x >= max(chunks)]) * columns_programs >= tune.programs:
        return longest
    return min(longest, max(tune.shortest, next_power_of_2(sum(chunks) * columns_programs // tune.programs)))


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

    def state_shape(self, count: int, value_dim: int | None = None) -> tuple[int, ...]:
        return count, self.heads, self.key_dim, value_dim or self.value_dim

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    @property
    def precision(self) -> str:
        return "tf32x3" if self.v.dtype == torch.float32 else "tf32"

    def heads_constants(self) -> dict[str, object]:
        """constexpr arguments that all kernels over chunks share."""
        sizes = {"HEADS": self.heads, "GROUPS": self.heads // self.k.shape[1], "KEY_DIM": self.key_dim}
        return sizes | {"WIDTH": tile_width(self.key_dim), "CHUNK": self.tune.chunk, "PRECISION": self.precision}

    def columns(self, launch: Launch, value_dim: int | None = None) -> dict[str, object]:
        """constexpr arguments of the values, and the launch's options."""
        value_dim = value_dim or self.value_dim
        columns = max(16, min(launch.columns, tile_width(value_dim)))
        return {"VALUE_DIM": value_dim, "COLUMNS": columns} | launch.options()


@dataclass(frozen=True)
class _Prepared:
    """What `prepare_kernel` leaves; fine_inverse, T in fp16 where inputs are bf16, for backward alone."""

    rows: Tensor
    ends: Tensor
    inverse: Tensor
    fine_inverse: Tensor | None
    attention: Tensor


def _prepare(call: _Call, training: bool) -> _Prepared:
    count, dtype = len(call.plan.chunks), call.v.dtype
    square = (count, call.heads, call.tune.chunk, call.tune.chunk)
    prepared = _Prepared(
        call.empty(count, call.heads, ROW_KINDS.value, call.tune.chunk),
        call.empty(count, call.heads),
        call.empty(*square, dtype=dtype),
        call.empty(*square, dtype=torch.float16) if dtype == torch.bfloat16 and training else None,
        call.empty(*square, dtype=dtype),
    )
    prepare_kernel[(call.heads, count)](
        call.q, call.k, call.a, call.b, call.A_log, call.dt_bias, prepared.rows, prepared.ends, prepared.inverse,
        prepared.fine_inverse, prepared.attention, call.plan.chunks, *call.strides("q", "k", "a", "b"), call.scale,
        **call.heads_constants(), DOT=tl.float32 if dtype == torch.float32 else tl.float16,
        COLUMNS=min(call.tune.prepare.columns, tile_width(call.key_dim)), STRONGEST=call.strongest,
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
    grid = (cdiv(values["VALUE_DIM"], values["COLUMNS"]), len(call.plan.segments) * call.heads)
    scan_kernel[grid](
        call.q, call.k, None if transfer else call.v, prepared.rows, prepared.ends, prepared.inverse,
        prepared.attention, initial, o, u, states, final, call.plan.segments, *call.strides("q", "k", "v"),
        **call.heads_constants(), **values,
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
    inverse = prepared.inverse if prepared.fine_inverse is None else prepared.fine_inverse
    grid = (cdiv(values["VALUE_DIM"], values["COLUMNS"]), len(call.plan.segments) * call.heads)
    reverse_scan_kernel[grid](
        call.q, call.k, do, prepared.rows, prepared.ends, inverse, prepared.attention, dfinal, dv, dstates, dinitial,
        call.plan.segments, *call.strides("q", "k"), **call.heads_constants(), **values,
    )  # fmt: skip


def _join(call: _Call, transfer: Tensor, own: Tensor, start: Tensor | None, last: Tensor, reverse: bool) -> Tensor:
    """fp32 `[segments, heads, Dk, Dv]`: the state that each segment starts from; fills `last`."""
    states, values, width = torch.empty_like(own), call.columns(call.tune.join), tile_width(call.key_dim)
    grid = (cdiv(values["VALUE_DIM"], values["COLUMNS"]), len(last) * call.heads)
    join_kernel[grid](
        transfer, own, start, states, last, call.plan.bounds, HEADS=call.heads, KEY_DIM=call.key_dim,
        WIDTH=width, ROWS=min(64, width), REVERSE=reverse, PRECISION=call.precision, **values,
    )  # fmt: skip
    return states


class _GatedDeltaRule(torch.autograd.Function):
    """Saves the inputs, what `prepare_kernel` left, and the states between segments."""

    @staticmethod
    def forward(
        ctx, q, k, v, a, b, A_log, dt_bias, initial, cut: Plan, count: int, tune: Tuning, training: bool,
        strongest: float,
    ):  # fmt: skip
        call = _Call(q, k, v, a, b, A_log, dt_bias, cut, tune, strongest)
        prepared = _prepare(call, training)
        final = call.empty(*call.state_shape(count))
        o, starts, transfer = torch.empty(v.shape, dtype=v.dtype, device=v.device), initial, None
        if cut.bounds is not None:
            segments = len(cut.segments)
            own = call.empty(*call.state_shape(segments))
            transfer = call.empty(*call.state_shape(segments, call.key_dim))
            _scan(call, prepared, tune.scan, final=own)
            _scan(call, prepared, tune.scan, final=transfer, transfer=True)
            starts = _join(call, transfer, own, initial, final, reverse=False)
        u, states = _kept(call) if tune.keep_states and training else (None, None)
        _scan(call, prepared, tune.scan, starts, o, u, states, final=final if cut.bounds is None else None)
        ctx.save_for_backward(
            q, k, v, a, b, A_log, dt_bias, initial, starts, transfer, u, states,
            prepared.rows, prepared.ends, prepared.inverse, prepared.fine_inverse, prepared.attention,
        )  # fmt: skip
        ctx.cut, ctx.tune, ctx.strongest = cut, tune, strongest
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx, do: Tensor | None, dfinal: Tensor | None):
        *inputs, initial, starts, transfer, u, states, rows, ends, inverse, fine, attention = ctx.saved_tensors
        call = _Call(*inputs, ctx.cut, ctx.tune, ctx.strongest)
        prepared = _Prepared(rows, ends, inverse, fine, attention)
        tune, bounds = ctx.tune, ctx.cut.bounds
        do = torch.zeros_like(call.v) if do is None else do
        do, dfinal = do.contiguous(), dfinal if dfinal is None else dfinal.contiguous()
        if states is None:
            u, states = _kept(call)
            _scan(call, prepared, tune.recompute, starts, u=u, states=states)
        dv, dstates = torch.empty_like(u), torch.empty_like(states)
        count = len(ctx.cut.segments) if bounds is None else len(bounds) - 1
        dinitial = None if initial is None and bounds is None else call.empty(*call.state_shape(count))
        if bounds is None:
            _reverse_scan(call, prepared, do, dfinal, dv, dstates, dinitial)
        else:
            own = call.empty(*call.state_shape(len(ctx.cut.segments)))
            _reverse_scan(call, prepared, do, None, dinitial=own)
            ends_of = _join(call, transfer, own, dfinal, dinitial, reverse=True)
            _reverse_scan(call, prepared, do, ends_of, dv, dstates)
        grads = _gradients(call, prepared, do, u, dv, states, dstates)
        return *grads, None if initial is None else dinitial.to(initial.dtype), None, None, None, None, None


def _kept(call: _Call) -> tuple[Tensor, Tensor]:
    """Room for u and the chunks' states."""
    dtype = call.v.dtype
    return call.empty(*call.v.shape, dtype=dtype), call.empty(*call.state_shape(len(call.plan.chunks)), dtype=dtype)


def _gradients(
    call: _Call, prepared: _Prepared, do: Tensor, u: Tensor, dv: Tensor, states: Tensor, dstates: Tensor
) -> tuple[Tensor, ...]:
    """Of q, k, v, a, b, A_log and dt_bias."""
    count, chunk, dtype, launch = len(call.plan.chunks), call.tune.chunk, call.v.dtype, call.tune.gradient
    dq, dk = (call.empty(call.tokens, call.heads, call.key_dim, dtype=dtype) for _ in range(2))
    parts = call.empty(count, call.heads, PART_KINDS.value, chunk)
    gradient_kernel[(2 * call.heads, count)](
        call.q, call.k, prepared.rows, prepared.ends, prepared.attention, do, u, dv, states, dstates, parts, dq, dk,
        call.plan.chunks, *call.strides("q", "k"), call.scale, WARPS=launch.warps,
        **call.heads_constants() | {"WIDTH": max(_NARROWEST, tile_width(call.key_dim))},
        **call.columns(launch) | {"COLUMNS": launch.columns},
    )  # fmt: skip
    da, db = (call.empty(*x.shape, dtype=x.dtype) for x in (call.a, call.b))
    sums = call.empty(2, count, call.heads)
    gate_gradient_kernel[(call.heads, count)](
        call.a, call.b, call.A_log, call.dt_bias, parts, da, db, sums, call.plan.chunks, *call.strides("a", "b"),
        HEADS=call.heads, CHUNK=chunk, STRONGEST=call.strongest, num_warps=1,
    )  # fmt: skip
    if call.heads != call.k.shape[1]:
        dq, dk = (x.unflatten(1, (call.k.shape[1], -1)).sum(2) for x in (dq, dk))
    dA_log, ddt_bias = sums.sum(1)
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
    allow_neg_eigval: bool = False,
    *,
    tune: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """See `megahybrid_kernels.gated_delta_rule`; float32, bfloat16 or float16, head dims up to 256.

    tune: launches for benchmarks; fixed by head dims and dtype when left out.
    """
    q, k = (x.to(v.dtype) for x in (q, k))
    q, k, v = map(dense_rows, (q, k, v))
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    tune = tune or tuning(max(k.shape[2], v.shape[2]), v.dtype)
    longest = longest_segment(sequences.lengths, v.shape[1], v.shape[2], tune)
    cut = plan(sequences.lengths, tune.chunk, longest, v.device)
    strongest = 2.0 if allow_neg_eigval else 1.0
    return _GatedDeltaRule.apply(
        q, k, v, a, b, A_log, dt_bias, initial_state, cut, sequences.count, tune, torch.is_grad_enabled(), strongest
    )
