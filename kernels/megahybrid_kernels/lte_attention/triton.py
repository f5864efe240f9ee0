"""Attention under learnable token eviction in Triton: tile sizes, launches and the autograd function.

Work per query head and token: `4 D` FLOPs forward and `14 D` backward for each visible key, since dq and dk, dv
recompute the logits separately; tiles that are only partly visible add about a tenth at a window of 768. The gate
"counterfactual" adds `4 D` backward for each pair that is not visible, and so does "displacing". See
`triton_columns` for how visibility is laid out, `triton_forward` and `triton_backward` for the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megahybrid_kernels.backend import dense_rows
from megahybrid_kernels.exit_positions.triton import exit_positions
from megahybrid_kernels.heads import Heads, row_strides
from megahybrid_kernels.integers import cdiv
from megahybrid_kernels.lte_attention.gate import UNSEEN, Gate
from megahybrid_kernels.lte_attention.triton_backward import (
    displaced_gradient_kernel,
    far_gradient_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    sum_chunks_kernel,
    unseen_gradient_kernel,
)
from megahybrid_kernels.lte_attention.triton_columns import Columns, Partition, far_columns, partition
from megahybrid_kernels.lte_attention.triton_forward import forward_kernel
from megahybrid_kernels.sequences import Sequences
from megahybrid_kernels.targets import CDNA3, HOPPER, table_of
from megahybrid_kernels.tuning import Launch
from megahybrid_kernels.untracked import applied


@dataclass(frozen=True)
class Tuning:
    """Tiles of all kernels; what two kernels must agree on stands here once.

    Attributes:
        rows: query rows (tokens times packed heads) of a program of the forward and of dq; at least every `size` of
            `near` and `far`.
        keys: keys of a program of the near gradient, and so what near keys are aligned to; a multiple of the `size` of
            `forward` and `dq`.
        columns: far columns of a program.
        forward, dq, near, far: the four kernels' launches, their size a step of the loop: keys where a program owns
            queries, query rows where it owns keys.
    """

    rows: int
    keys: int
    columns: int
    forward: Launch
    dq: Launch
    near: Launch
    far: Launch


def tuning(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tuning:
    """Fixed by head dim, dtype and the kind of GPU, so that all ranks and lengths run the same code."""
    if dtype == torch.float32:
        # Without tf32 a product unrolls to single multiplications: larger tiles compile for minutes.
        launch = Launch(16, 4, 1)
        return Tuning(32, 16, 16, launch, launch, launch, launch)
    if table_of(device) is CDNA3:
        launch = Launch(32, 4, 1)
        wide = head_dim > 128
        return Tuning(64 if wide else 128, 32 if wide else 64, 32 if wide else 64, launch, launch, launch, launch)
    if head_dim <= 64:
        return Tuning(128, 64, 64, Launch(64, 4, 3), Launch(32, 4, 3), Launch(64, 4, 3), Launch(64, 4, 3))
    if head_dim <= 128:
        return Tuning(128, 64, 64, Launch(64, 8, 3), Launch(64, 8, 2), Launch(64, 8, 2), Launch(64, 8, 2))
    launch = Launch(32, 4, 2)
    if table_of(device) is HOPPER:
        return Tuning(64, 32, 32, launch, launch, launch, launch)
    keys = Launch(32, 8, 2)
    return Tuning(64, 32, 32, launch, dq=Launch(32, 4, 1), near=keys, far=keys)


def _pack(groups: int, rows: int) -> int:
    """Query heads of a KV head that share a tile: the largest power of two that divides them, 16 tokens a tile left."""
    pack = groups & -groups
    return min(pack, rows // 16)


@dataclass(frozen=True)
class _Shape(Heads):
    """What every launch needs to know of q, k and v."""

    pack: int
    tune: Tuning

    @classmethod
    def of(cls, q: Tensor, k: Tensor, tune: Tuning | None) -> _Shape:
        groups = q.shape[1] // k.shape[1]
        tune = tune or tuning(q.shape[2], q.dtype, q.device)
        return cls(q.shape[0], k.shape[1], groups, q.shape[2], _pack(groups, tune.rows), tune)

    @property
    def queries(self) -> int:
        """Tokens of a query tile."""
        return self.tune.rows // self.pack

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        return super().constants(dtype) | {"PACK": self.pack, "GROUPS": self.groups // self.pack}


def _forward(
    shape: _Shape, q: Tensor, k: Tensor, v: Tensor, columns: Columns, part: Partition
) -> tuple[Tensor, Tensor]:
    o = torch.empty(*q.shape, dtype=q.dtype, device=q.device)
    log_total = torch.empty(shape.kv_heads, shape.tokens, shape.groups, dtype=torch.float32, device=q.device)
    launch = shape.tune.forward
    forward_kernel[part.tiles * shape.kv_heads * (shape.groups // shape.pack)](
        q, k, v, o, log_total, columns.until, part.begins, part.ends, columns.tile_lists, columns.tile_first,
        columns.tile_full, columns.tile_count, *row_strides(q, k, v), shape.tokens, part.window, shape.log2_scale,
        **shape.constants(q.dtype), QUERIES=part.queries, KEYS=part.keys, STEP=launch.size,
        **launch.options(),
    )  # fmt: skip
    return o, log_total


def _query_gradient(shape: _Shape, saved: tuple[Tensor, ...], do: Tensor, columns: Columns, part: Partition):
    q, k, v, o, log_total = saved
    dq, delta = torch.empty_like(o), torch.empty_like(log_total)
    launch = shape.tune.dq
    query_gradient_kernel[part.tiles * shape.kv_heads * (shape.groups // shape.pack)](
        q, k, v, o, do, dq, log_total, delta, columns.until, part.begins, part.ends, columns.tile_lists,
        columns.tile_first, columns.tile_full, columns.tile_count, *row_strides(q, k, v), shape.tokens, part.window,
        shape.log2_scale, shape.softmax_scale, **shape.constants(q.dtype), QUERIES=part.queries, KEYS=part.keys,
        STEP=launch.size, **launch.options(),
    )  # fmt: skip
    return dq, delta


def _far_gradient(shape: _Shape, saved, do: Tensor, delta: Tensor, columns: Columns, part: Partition, logit: bool):
    """fp32 `[kv_heads, partial_rows, head_dim]` each: dk / softmax_scale and dv of the far columns' far uses; and with
    `logit`, without head_dim, the sums of their ds."""
    q, k, v, _, log_total = saved
    sums = (shape.kv_heads, columns.partial_rows, shape.head_dim)
    dk, dv = (torch.empty(*sums, dtype=torch.float32, device=q.device) for _ in range(2))
    gate = torch.empty(sums[:2] if logit else 0, dtype=torch.float32, device=q.device)
    launch, constants = shape.tune.far, shape.constants(q.dtype)
    chunks, capacity = columns.lists.shape[1:]
    far_gradient_kernel[cdiv(capacity, shape.tune.columns) * chunks * shape.kv_heads](
        q, k, v, do, dk, dv, gate, log_total, delta, columns.until, columns.partial, columns.lists, columns.list_counts,
        *row_strides(q, k, v), shape.tokens, part.window, shape.log2_scale, part.chunk, chunks, capacity,
        columns.list_counts.stride(0), columns.partial_rows,
        **constants, PART_QUERIES=part.queries, PART_KEYS=part.keys, QUERIES=max(1, launch.size // shape.pack),
        COLUMNS=shape.tune.columns, LOGIT=logit, **launch.options(),
    )  # fmt: skip
    if columns.partial is not columns.rank:
        sum_chunks_kernel[cdiv(shape.tokens, 32) * shape.kv_heads](
            dk, dv, gate, columns.all, columns.rank, columns.partial, shape.tokens, columns.partial_rows,
            HEAD_DIM=shape.head_dim, WIDTH=constants["WIDTH"], COLUMNS=32, LOGIT=logit,
            num_warps=8 if shape.head_dim > 128 and table_of(q.device) not in (HOPPER, CDNA3) else 4,
        )  # fmt: skip
    return dk, dv, gate


def _key_gradient(shape: _Shape, saved, do: Tensor, delta: Tensor, columns: Columns, part: Partition, logit: bool):
    """dk, dv and the gate's gradient."""
    q, k, v, _, log_total = saved
    far = _far_gradient(shape, saved, do, delta, columns, part, logit)
    dk, dv = (torch.empty(*k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    dscore = torch.empty(*k.shape[:2], dtype=torch.float32, device=k.device)
    launch = shape.tune.near
    key_gradient_kernel[cdiv(shape.tokens, part.keys) * shape.kv_heads](
        q, k, v, do, dk, dv, dscore, *far, log_total, delta, columns.until, columns.rank, columns.partial,
        part.begins, part.ends, *row_strides(q, k, v), shape.tokens, part.window, shape.log2_scale, shape.softmax_scale,
        columns.partial_rows, **shape.constants(q.dtype), PART_QUERIES=part.queries, KEYS=part.keys,
        QUERIES=max(1, launch.size // shape.pack), LOGIT=logit, **launch.options(),
    )  # fmt: skip
    return dk, dv, dscore


def _add_unseen(shape: _Shape, saved, do: Tensor, delta: Tensor, dscore: Tensor, columns: Columns, part: Partition):
    """To the gate's gradient, what queries give that do not see a key."""
    q, k, v, _, log_total = saved
    launch = shape.tune.near
    unseen_gradient_kernel[cdiv(shape.tokens, part.keys) * shape.kv_heads](
        q, k, v, do, dscore, log_total, delta, columns.until, part.ends, *row_strides(q, k, v), shape.tokens,
        shape.log2_scale, **shape.constants(q.dtype), KEYS=part.keys, QUERIES=max(1, launch.size // shape.pack),
        **launch.options(),
    )  # fmt: skip


@dataclass(frozen=True)
class _Buffer:
    """What competes for a head's buffer: scores of the tokens after each document's sinks that leave the window, and
    the room that there is for them."""

    score: Tensor
    sequences: Sequences
    window: int
    sinks: int
    room: int

    def displace(self, dscore: Tensor) -> None:
        """Take from dscore (fp32 `[tokens, heads]`) what the gate "displacing" leaves out."""
        heads = dscore.shape[1]
        displaced_gradient_kernel[self.sequences.count * heads](
            dscore, self.score, self.sequences.cu_seqlens, self.window, self.sinks, self.room, heads, BLOCK=1024
        )


class _LTEAttention(torch.autograd.Function):
    """Saves q, k, v, o, the log-denominators and the index lists; the backward makes nothing quadratic either."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, score: Tensor, columns: Columns, part: Partition, shape: _Shape,
                gate: Gate, buffer: _Buffer | None):  # fmt: skip
        o, log_total = _forward(shape, q, k, v, columns, part)
        ctx.save_for_backward(q, k, v, o, log_total)
        ctx.columns, ctx.part, ctx.shape, ctx.score_dtype = columns, part, shape, score.dtype
        ctx.gate, ctx.buffer = gate, buffer
        return o

    @staticmethod
    def backward(ctx, do: Tensor):
        saved, rest, do = ctx.saved_tensors, (ctx.columns, ctx.part), do.contiguous()
        dq, delta = _query_gradient(ctx.shape, saved, do, *rest)
        dk, dv, dscore = _key_gradient(ctx.shape, saved, do, delta, *rest, ctx.gate != "value")
        if ctx.gate in UNSEEN and ctx.needs_input_grad[3]:
            _add_unseen(ctx.shape, saved, do, delta, dscore, *rest)
            if ctx.buffer is not None:
                ctx.buffer.displace(dscore)
        return dq, dk, dv, dscore.to(ctx.score_dtype), None, None, None, None, None


def lte_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    sequences: Sequences,
    window_size: int,
    sink_size: int,
    buffer_size: int | None = None,
    gate: Gate = "value",
    *,
    tune: Tuning | None = None,
) -> Tensor:
    """See `megahybrid_kernels.lte_attention.lte_attention`; float32, bfloat16 or float16, head dims up to 256.

    tune: tile sizes for benchmarks; fixed by head dim, dtype and GPU when left out.
    """
    q, k, v = map(dense_rows, (q, k, v))
    shape = _Shape.of(q, k, tune)
    keys = score.detach().contiguous()
    exits = None
    if buffer_size is not None and max(sequences.lengths) > buffer_size + window_size + 1:
        exits = exit_positions(keys, sequences, window_size, sink_size, buffer_size)
    part = partition(sequences, window_size, shape.queries, shape.tune.keys, exits is not None)
    columns = far_columns(keys, exits, sequences, part, sink_size, buffer_size)
    buffer = None
    if gate == "displacing" and exits is not None:
        buffer = _Buffer(keys, sequences, window_size, sink_size, buffer_size - sink_size)
    return applied(_LTEAttention, q, k, v, score, columns, part, shape, gate, buffer)
