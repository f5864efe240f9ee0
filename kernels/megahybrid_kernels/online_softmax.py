"""The online softmax of attention kernels (Milakov & Gimelshein 2018; Dao 2022), in powers of two."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from megahybrid_kernels.integers import cdiv


@triton.jit
def softmax_step(acc, total, peak, logits, v, scale, PRECISION: tl.constexpr):
    """One more tile of keys: `[rows, WIDTH]` sum of values, `[rows]` sum of weights and greatest logit.

    logits: `[rows, keys]`, scaled by `scale` here, -inf where unseen; v: `[keys, WIDTH]`. The sums are relative to
    `2 ** peak`.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)
    p = tl.exp2(logits * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def softmax_step_of_rows(acc, total, peak, logits, v, seen, scale, PRECISION: tl.constexpr):
    """`softmax_step` where a row sees all of the keys or none, `seen` `[rows]`; this masks no single logit."""
    new_peak = tl.maximum(peak, tl.where(seen, tl.max(logits, 1) * scale, float("-inf")))
    p = tl.exp2(logits * scale - tl.where(seen, new_peak, float("inf"))[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_peak


def log2_scale(head_dim: int) -> float:
    """The softmax's scale for logits in powers of two."""
    return head_dim**-0.5 * math.log2(math.e)


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's `input_precision` for q, k and v in `dtype`; half precision has but one."""
    return "ieee" if dtype == torch.float32 else "tf32"


def split_count(pairs: int, slots: int, block: int, programs: int, most: int) -> int:
    """Into how many parts a step of decoding cuts the slots of each of `pairs` sequences and heads: about `programs`
    programs in all, of at least `block` slots, and `most` parts at most."""
    return max(1, min(programs // pairs, cdiv(slots, block), most))
