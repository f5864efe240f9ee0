"""The router that gives each token of each KV head its retention logit."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.backend import takes_triton, unsupported_head_dims
from megahybrid_kernels.retention_router import reference
from megahybrid_kernels.retention_router.parameters import Dropout, RouterParameters, RouterState, margin
from megahybrid_kernels.sequences import Sequences
from megahybrid_kernels.targets import CDNA3, HOPPER, table_of

__all__ = [
    "Dropout",
    "RouterParameters",
    "RouterState",
    "margin",
    "retention_logits",
    "retention_scores",
    "retention_scores_streamed",
    "unsupported",
]


def retention_logits(
    k: Tensor,
    v: Tensor,
    parameters: RouterParameters,
    sequences: Sequences,
    dropout: Dropout | None = None,
    dilation: int = 2,
) -> Tensor:
    """Retention logits from dilated convolutions over time, one independent network per KV head.

    He & Garner (arXiv 2510.20787), section 3.2: `u = [k; v]` goes through convolutions with bias and SiLU, centred and
    so not causal, each padded with zeros at the borders of every document, then through a linear map to one logit. The
    score is `sigmoid(logit) - 1/2`; a token's logit depends on `margin(...)` tokens on either side.

    Args:
        k, v: `[tokens, kv_heads, head_dim]`, k before its rotation.
        parameters: see `RouterParameters`; each layer's kernel size must be odd.
        sequences: borders of the packed documents.
        dropout: training only; applied before each convolution.
        dilation: of every convolution.

    Returns:
        `[tokens, kv_heads]` in at least fp32, in which all is computed.

    Raises:
        ValueError: shapes do not fit, or a kernel size is even.
    """
    backend = _backend(k, v, parameters, sequences, dropout)
    return backend.retention_logits(k, v, parameters, sequences, dropout, dilation)


def retention_scores(
    k: Tensor,
    v: Tensor,
    parameters: RouterParameters,
    sequences: Sequences,
    dropout: Dropout | None = None,
    dilation: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, `sigmoid(retention_logits(...)) - 1/2`, and k and v for all that comes after: their gradients from there
    are added to by the kernel that has the router's, instead of in passes of their own.

    Arguments and errors are those of `retention_logits`.
    """
    backend = _backend(k, v, parameters, sequences, dropout)
    return backend.retention_scores(k, v, parameters, sequences, dropout, dilation)


def retention_scores_streamed(
    k: Tensor,
    v: Tensor,
    parameters: RouterParameters,
    sequences: Sequences,
    state: RouterState | None,
    dilation: int = 2,
) -> tuple[Tensor, RouterState]:
    """`retention_scores` for prefill in pieces and decode: each row holds the score of `margin(...)` tokens before.

    A layer is computed as soon as its right context has come, from a few past rows of its input; every score is final
    when it appears. The last `margin(...)` tokens of a document, whose right context is cut, never get one.

    Args:
        k, v, parameters, dilation: as for `retention_logits`.
        sequences: borders of the new tokens; `sequences.starts` says how many tokens of each came before, and None that
            none did, which lets a GPU run the kernels of `retention_scores`.
        state: from the sequences' earlier tokens; where all begin here it is not read, and None does.

    Returns:
        `[tokens, kv_heads]` in at least fp32, in the row of position p the score of position `p - margin(...)`, without
        meaning where that is negative; and the new state.

    Raises:
        ValueError: as `retention_logits`, or the state is of another number of sequences or missing.
    """
    _check(k, v, parameters, sequences)
    if state is None and sequences.starts is not None:
        raise ValueError("the sequences do not begin here, but there is no state of their earlier tokens")
    if state is not None and state.rows[0].shape[0] != sequences.count:
        raise ValueError(f"the state holds {state.rows[0].shape[0]} sequences, but {sequences.count} were given")
    takes = _takes(k, v, parameters, sequences) and not torch.is_grad_enabled()
    if takes and state is not None and max(sequences.lengths) == 1 and _steps(parameters):
        from megahybrid_kernels.retention_router.triton_step import retention_scores_step

        return retention_scores_step(k, v, parameters, sequences.positions, state, dilation)
    if takes and sequences.starts is None and _fits(k, parameters):
        from megahybrid_kernels.retention_router.triton_prefill import retention_scores_first

        return retention_scores_first(k, v, parameters, sequences, dilation)
    state = state or RouterState.empty(sequences.count, parameters, dilation)
    return reference.retention_scores_streamed(k, v, parameters, sequences, state, dilation)


def unsupported(dtype: torch.dtype, head_dim: int, layers: int = 3) -> str | None:
    """Why the kernels do not take whole sequences of such heads, k in `dtype`; None where they do."""
    if layers > 3:  # as many as a launch serves
        return f"take at most 3 convolutions, not {layers}"
    if reason := unsupported_head_dims(dtype, head_dim):
        return reason
    table = table_of(torch.device("cuda"))
    if table is CDNA3:
        return "are not compiled for this GPU: Triton fails on a weight's gradient"
    # What half a layer's weight has room for in shared memory, on Blackwell its products in tensor memory.
    most = (256 if table is HOPPER else 128) // (2 if dtype == torch.float32 else 1)
    if head_dim > most:
        return f"take head dims up to {most} in {str(dtype).removeprefix('torch.')}, not {head_dim}"
    return None


def _backend(k: Tensor, v: Tensor, parameters: RouterParameters, sequences: Sequences, dropout: Dropout | None):
    _check(k, v, parameters, sequences)
    if dropout is not None and not 0 <= dropout.probability < 1:
        raise ValueError(f"the dropout probability must lie in [0, 1), but is {dropout.probability}")
    if _takes(k, v, parameters, sequences) and _fits(k, parameters):
        from megahybrid_kernels.retention_router import triton as backend
    else:
        backend = reference
    return backend


def _takes(k: Tensor, v: Tensor, parameters: RouterParameters, sequences: Sequences) -> bool:
    weights, biases, *projection = parameters
    return takes_triton(k, v, *weights, *biases, *projection, sequences.cu_seqlens)


def _fits(k: Tensor, parameters: RouterParameters) -> bool:
    return unsupported(k.dtype, k.shape[2], len(parameters.weights)) is None


def _steps(parameters: RouterParameters) -> bool:
    """Whether a launch serves all layers, each of which has a state."""
    return len(parameters.weights) <= 3 and all(weight.shape[2] > 1 for weight in parameters.weights)


def _check(k: Tensor, v: Tensor, parameters: RouterParameters, sequences: Sequences) -> None:
    if k.shape != v.shape or k.shape[0] != sequences.tokens:
        raise ValueError(f"k {list(k.shape)}, v {list(v.shape)} and {sequences.tokens} tokens do not fit together")
    heads, channels = k.shape[1], 2 * k.shape[2]
    for weight in parameters.weights:
        if weight.shape[1] != channels or weight.shape[0] % heads:
            raise ValueError(f"a weight is {list(weight.shape)}, but has {heads} heads of {channels} input channels")
        if weight.shape[2] % 2 == 0:
            raise ValueError(f"the kernel size must be odd, but is {weight.shape[2]}")
        channels = weight.shape[0] // heads
    if parameters.projection.shape != (heads, channels):
        raise ValueError(f"the projection is {list(parameters.projection.shape)}, but must be {[heads, channels]}")
