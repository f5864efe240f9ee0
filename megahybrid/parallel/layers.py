"""Tensor parallel layers on Megatron-core's collectives.

A mixer or MLP gathers its input once (`enter`), applies any number of column-split projections to it without further
communication, and leaves through one row-split projection that reduces. Hidden states are `[tokens, 1, hidden]`; with
sequence parallelism the residual stream holds `tokens / tensor` rows outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import VocabParallelEmbedding, mappings
from torch import Tensor, nn

from megahybrid.parallel.parameters import Initializer, ParameterSpec, attach_spec, parameter


def enter(x: Tensor, sequence_parallel: bool) -> Tensor:
    """The input of column-split projections: all tokens, with its gradient reduced over the tensor parallel ranks."""
    if sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x)
    return mappings.copy_to_tensor_model_parallel_region(x)


def shared(weight: Tensor) -> Tensor:
    """`weight`, of which every tensor parallel rank has the whole but sees only a part of the uses: other tokens under
    sequence parallelism, or its own heads. Its gradient is summed over these ranks."""
    return mappings.copy_to_tensor_model_parallel_region(weight)


class ColumnLinear(nn.Module):
    """y = x Wᵀ with W `[out, in]` split over its rows; x must have come through `enter`.

    It is applied by `project`, with those that share its input, in the forward of the module that holds them.
    """

    def __init__(self, in_features: int, out_features: int, initializer: Initializer):
        super().__init__()
        self.weight = parameter(out_features, in_features, axis=0, initializer=initializer)


def project(x: Tensor, *layers: ColumnLinear) -> tuple[Tensor, ...]:
    """Each layer's output for the one input, whose gradients are added up by the matmuls that make them."""
    weights = [layer.weight for layer in layers]
    if not torch.is_grad_enabled():
        return tuple(F.linear(x, weight) for weight in weights)
    return _Projections.apply(x, *weights)


class _Projections(torch.autograd.Function):
    """Autograd alone would write one input gradient a projection and add them up in kernels of their own."""

    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        dx = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            dx.addmm_(grad, weight)
        return dx.view_as(x), *(grad.T @ rows for grad in grads)


class RowLinear(nn.Module):
    """y = x Wᵀ with W `[out, in]` split over its columns; x is this rank's part of the features, y is whole."""

    def __init__(self, in_features: int, out_features: int, initializer: Initializer, sequence_parallel: bool):
        super().__init__()
        self.weight = parameter(out_features, in_features, axis=1, initializer=initializer)
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y)
        return mappings.reduce_from_tensor_model_parallel_region(y)


class VocabEmbedding(VocabParallelEmbedding):
    """Token ids `[tokens]` → `[tokens, 1, hidden]`, the table `[vocab, hidden]` split over its rows."""

    def __init__(self, vocab_size: int, hidden_size: int, initializer: Initializer, config: ModelParallelConfig):
        super().__init__(
            vocab_size,
            hidden_size,
            init_method=lambda weight: weight,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        attach_spec(self.weight, ParameterSpec((vocab_size, hidden_size), 0, initializer, True))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = super().forward(tokens[None])
        return hidden if self.reduce_scatter_embeddings else hidden.transpose(0, 1)
