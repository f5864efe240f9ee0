"""One tile's part of the gradients of softmax attention, for kernels that compute the probabilities again.

With s = scale q k^T, p = exp(s - log_total) and upstream gradient do of the output:

    dv_j = sum_i p_ij do_i                    delta_i = <do_i, o_i>
    dp_ij = <do_i, v_j>                       ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale sum_j ds_ij k_j              dk_j = scale sum_i ds_ij q_i

`scale` and `log_total` are in powers of two; sums of dq and dk leave out the softmax's scale. A row whose log_total is
inf has p = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_step(
    dq, q, do, k, v, log_total, delta, visible, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dq `[rows, WIDTH]` of one more tile of keys; `visible` matters only if MASKED."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(logits * scale - log_total[:, None])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def key_step(
    dk, dv, k, v, q, do, log_total, delta, visible, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dk and dv `[keys, WIDTH]` of one more tile of query rows, and its ds, keys by rows; `visible`, too, which matters
    only if MASKED.

    Probabilities are computed transposed, keys by rows, so that both sums are plain products and nothing that a product
    made is transposed.
    """
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = tl.exp2(logits * scale - log_total[None, :])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, ds


@triton.jit
def unseen_step(gate, k, v, q, do, log_total, delta, unseen, scale, PRECISION: tl.constexpr):
    """ds, keys by rows, added to `gate` where `unseen`: of one more key beside those that the row sees, whose p is
    `e / (Z + e)`."""
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = 1 / (1 + tl.exp2(log_total[None, :] - logits * scale))
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    return gate + tl.where(unseen, p * (dp - delta[None, :]), 0.0)
