"""The gated delta rule, the recurrence of Gated DeltaNet."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.backend import takes_triton, unsupported_head_dims
from megahybrid_kernels.gated_delta_rule import reference
from megahybrid_kernels.gated_delta_rule.border import Border
from megahybrid_kernels.sequences import Sequences

__all__ = ["Border", "gated_delta_rule", "unsupported"]


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
    *,
    output_final_state: bool = True,
    in_place: bool = False,
    allow_neg_eigval: bool = False,
    border: Border | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Read and write a matrix-valued memory token by token, every sequence its own.

        alpha_t = exp(-exp(A_log) softplus(a_t + dt_bias)),   beta_t = sigmoid(b_t)
        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = S_t^T q_t

    with k_t and q_t divided by their L2 norms, x / sqrt(sum(x^2) + 1e-6), and q_t then scaled by Dk^-0.5. The memory
    decays first, then its error about v_t is corrected (Yang et al., "Gated Delta Networks", arXiv 2412.06464,
    equation 10). Arithmetic is in at least float32. Every argument but `sequences` is differentiable.

    Args:
        q, k: `[tokens, key_heads, Dk]`, not normalised.
        v: `[tokens, value_heads, Dv]`; value head h uses q and k of head `h // (value_heads // key_heads)`.
        a, b: `[tokens, value_heads]`, the raw projections that gate and write strength are made of.
        A_log, dt_bias: `[value_heads]`.
        sequences: which tokens belong together.
        initial_state: `[sequences, value_heads, Dk, Dv]`, what an earlier call returned for the tokens before these;
            None is an empty memory.
        output_final_state: whether the memories after the last tokens are wanted; they take memory, `4 Dk Dv` bytes a
            sequence and value head, which training has no use for.
        in_place: the op may overwrite `initial_state`, as it does on a GPU for one token of every sequence.
        allow_neg_eigval: beta_t is 2 sigmoid(b_t), so that a write may turn what the memory holds along k_t around
            (Grazzi et al., arXiv 2411.12537).
        border: the tokens are one of several rows that follow each other; without states, which are these rows' own.

    Returns:
        o `[tokens, value_heads, Dv]` in v's dtype, and the memory after each sequence's last token
        `[sequences, value_heads, Dk, Dv]` in at least float32, or None without `output_final_state`.

    Raises:
        ValueError: a shape does not fit the others or `sequences`, or there are states at a border.
    """
    if border is not None and (output_final_state or initial_state is not None):
        raise ValueError("the states of rows that follow each other pass from one to the next, not in or out")
    (tokens, key_heads, key_dim), (value_heads, value_dim) = k.shape, v.shape[1:]
    if tokens != sequences.tokens:
        raise ValueError(f"k has {tokens} tokens, but the sequences have {sequences.tokens}")
    if value_heads % key_heads:
        raise ValueError(f"the {value_heads} value heads are not a multiple of the {key_heads} key heads")
    expected = {
        "q": (q, (tokens, key_heads, key_dim)),
        "v": (v, (tokens, value_heads, value_dim)),
        "a": (a, (tokens, value_heads)),
        "b": (b, (tokens, value_heads)),
        "A_log": (A_log, (value_heads,)),
        "dt_bias": (dt_bias, (value_heads,)),
        "initial_state": (initial_state, (sequences.count, value_heads, key_dim, value_dim)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}, but k, v and the sequences call for {shape}")
    takes = takes_triton(v, q, k, a, b, A_log, dt_bias, initial_state, sequences.cu_seqlens)
    step = output_final_state and in_place and tokens == sequences.count
    if takes and step and _overwritable(initial_state):
        from megahybrid_kernels.gated_delta_rule.triton_step import gated_delta_rule_step

        return gated_delta_rule_step(q, k, v, a, b, A_log, dt_bias, initial_state, allow_neg_eigval), initial_state
    if takes and unsupported(v.dtype, key_dim, value_dim) is None:
        from megahybrid_kernels.gated_delta_rule import triton as backend
    else:
        backend = reference
    options = (output_final_state, allow_neg_eigval, border)
    return backend.gated_delta_rule(q, k, v, a, b, A_log, dt_bias, sequences, initial_state, *options)


def unsupported(dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Why the kernels do not take whole sequences of such heads, v in `dtype`; None where they do."""
    return unsupported_head_dims(dtype, key_dim, value_dim)


def _overwritable(state: Tensor | None) -> bool:
    return state is not None and state.dtype == torch.float32 and state.is_contiguous() and not torch.is_grad_enabled()
