"""Steps of decoding that `bench_nsa decode` judges and times: one token of every sequence, of full caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from bench_common import DEVICE, attention_steps, errors, timed
from nsa_rows import TOLERANCE, Sizes
from torch import Tensor

from megahybrid_kernels import NSACache, Sequences
from megahybrid_kernels.native_sparse_attention import reference, triton_decode
from megahybrid_kernels.native_sparse_attention.pooling import pool

# More than the L2 cache holds.
_BYTES = 2**27
# What of the step's launches can be tried: its module's constants of these names in capitals, after a line.
LAUNCHES = ("slots", "bytes", "most_splits", "programs", "selected_programs", "logits")


def steps(sizes: Sizes, context: int, batch: int, changes: str) -> Iterator[dict]:
    """After `context` tokens, and one earlier, where the step completes a block (`context` is a multiple of it). Beside
    each, full attention with as many KV heads, and with 8 (four query heads each)."""
    cache = filled(sizes, context, batch)
    moved = 2 * batch * sizes.heads * sizes.head_dim * cache.room.k.element_size()
    moved *= context // sizes.block + sizes.blocks * sizes.block + sizes.window
    copies = [cache, *(cache.select(range(batch)) for _ in range(_BYTES // moved if DEVICE == "cuda" else 0))]
    heads = (sizes.heads, sizes.query_heads // 4)
    full = [attention_steps(batch, context, each, sizes.query_heads, sizes.head_dim) for each in heads]
    yield from () if changes else full
    for tokens in (context, context - 1):
        inputs = new_tokens(sizes, batch)
        judged = judge(sizes, cache, tokens, inputs, changes)
        positions = torch.full((batch,), tokens, device=DEVICE)
        with changed(changes):
            calls = [
                partial(triton_decode.native_sparse_attention_step, *inputs, each, positions, *sizes.limits[1:])
                for each in copies
            ]
            row = f"{batch} sequences, after {tokens} tokens" + ", completing a block" * (tokens < context)
            line = timed("native_sparse_attention_step", row, calls, moved)
        by = {f"by_attention_{n}": round(line["ms"] / x["ms"], 3) for n, x in zip(heads, full, strict=True)}
        yield line | {"try": changes} | judged | by


def filled(sizes: Sizes, context: int, batch: int) -> NSACache:
    """Of random tokens whose keys are alike within a block; the op makes the means."""
    like = {"dtype": sizes.dtype, "device": DEVICE}
    cache = NSACache.empty(batch, sizes.heads, sizes.head_dim, sizes.block, **like).with_room(context + 2 * sizes.block)
    k, v = (torch.randn(batch * context, sizes.heads, sizes.head_dim, **like) for _ in range(2))
    k += 2 * torch.randn_like(k[:: sizes.block]).repeat_interleave(sizes.block, 0)
    return cache.append(k, v, Sequences.of((context,) * batch, DEVICE))


def new_tokens(sizes: Sizes, batch: int) -> list[Tensor]:
    """q, k, v and gates."""
    shapes = [(heads, sizes.head_dim) for heads in (sizes.query_heads, sizes.heads, sizes.heads)]
    x = [torch.randn(batch, *shape, device=DEVICE) for shape in shapes]
    gates = torch.rand(batch, sizes.query_heads, 3, device=DEVICE)
    return [each.to(sizes.dtype) for each in (2 * x[0], *x[1:], gates)]


@torch.no_grad()
def judge(sizes: Sizes, cache: NSACache, tokens: int, inputs: list[Tensor], changes: str) -> dict[str, object]:
    """Error of the step beside the reference in float64 on the same means, one sequence after the other; whether the
    mean of a block that it completes is training's, and a second step's bits are the first's.

    Exits or raises ValueError where it is wrong.
    """
    batch = inputs[0].shape[0]
    cache = NSACache((tokens,) * batch, cache.select(range(batch)).room)
    positions = torch.full((batch,), tokens, device=DEVICE)
    expected = []
    for n in range(batch):
        one = cache.select([n])
        one.room.rows = tuple(rows.double() for rows in one.room.rows)
        each = (x[n : n + 1].double() for x in inputs)
        sequences = Sequences.of((1,), DEVICE, positions[:1])
        expected.append(reference.native_sparse_attention_with_cache(*each, one, sequences, *sizes.limits)[0])
    whole = (tokens + 1) // sizes.block
    for means in cache.room.rows[2:]:
        means[:, :, tokens // sizes.block :] = torch.nan
    with changed(changes):
        step = partial(triton_decode.native_sparse_attention_step, *inputs, cache, positions, *sizes.limits[1:])
        o, again = step(), step()
    result = {"error": errors((o,), (torch.cat(expected),), TOLERANCE)[0], "bit_equal_repeat": torch.equal(o, again)}
    if (tokens + 1) % sizes.block == 0:
        for rows, means in zip(cache.room.rows[:2], cache.room.rows[2:], strict=True):
            last = rows[:, :, (whole - 1) * sizes.block : whole * sizes.block].transpose(1, 2)
            if not torch.equal(pool(last), means[:, :, whole - 1]):
                raise ValueError("the mean of the completed block is not that of training")
        result["mean_bit_equal"] = True
    return result


def check(changes: str) -> None:
    """Raises ValueError for a launch that there is not."""
    for change in changes.split():
        name, _, value = change.partition("=")
        if name not in LAUNCHES or not value.isdecimal():
            raise ValueError(f"'{change}' should be a number of {', '.join(LAUNCHES)}.")


@contextmanager
def changed(changes: str) -> Iterator[None]:
    """The step's constants as `changes` says."""
    new = {f"_{name.upper()}": int(value) for name, _, value in (change.partition("=") for change in changes.split())}
    before = {name: getattr(triton_decode, name) for name in new}
    vars(triton_decode).update(new)
    try:
        yield
    finally:
        vars(triton_decode).update(before)
