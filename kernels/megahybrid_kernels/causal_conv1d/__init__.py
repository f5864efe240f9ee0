"""The short causal convolution before a linear mixer."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.backend import takes_triton
from megahybrid_kernels.causal_conv1d import reference
from megahybrid_kernels.sequences import Sequences

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    sequences: Sequences,
    initial_state: Tensor | None = None,
    *,
    output_final_state: bool = True,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Convolve each channel with its own few weights over the latest tokens of the same sequence, then SiLU.

        y_t = silu(sum_{i < width} weight[:, width - 1 - i] x_{t-i})

    without bias, `weight[:, -1]` on the current token as in `torch.nn.Conv1d` (Yang et al., "Gated Delta Networks",
    arXiv 2412.06464, section 3.4). Arithmetic is in at least float32. x, weight and initial_state are differentiable.

    Args:
        x: `[tokens, channels]`.
        weight: `[channels, width]`.
        sequences: which tokens belong together.
        initial_state: `[sequences, width - 1, channels]`, the inputs before each sequence's first token, oldest first;
            None for sequences that begin here, which is the same as zeros.
        output_final_state: whether the new state is wanted.
        in_place: the op may overwrite `initial_state`, as it does on a GPU for one token of every sequence.

    Returns:
        y `[tokens, channels]`, and the last width - 1 inputs of each sequence `[sequences, width - 1, channels]`, with
        those of initial_state where a sequence is shorter, or None without `output_final_state`; both in x's dtype.

    Raises:
        ValueError: a shape does not fit the others or `sequences`.
    """
    channels, width = weight.shape
    if x.shape != (sequences.tokens, channels):
        raise ValueError(f"x is {tuple(x.shape)}, but weight and the sequences call for {(sequences.tokens, channels)}")
    state_shape = (sequences.count, width - 1, channels)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(
            f"initial_state is {tuple(initial_state.shape)}, but weight and the sequences call for {state_shape}"
        )
    takes = takes_triton(x, weight, initial_state, sequences.cu_seqlens)
    step = output_final_state and in_place and sequences.tokens == sequences.count
    if takes and step and _overwritable(x, initial_state):
        from megahybrid_kernels.causal_conv1d.triton_step import causal_conv1d_step

        return causal_conv1d_step(x, weight, initial_state), initial_state
    if takes:
        from megahybrid_kernels.causal_conv1d import triton as backend
    else:
        backend = reference
    return backend.causal_conv1d(x, weight, sequences, initial_state, output_final_state)


def _overwritable(x: Tensor, state: Tensor | None) -> bool:
    return state is not None and state.dtype == x.dtype and state.is_contiguous() and not torch.is_grad_enabled()
