"""The router's first piece of prefill, by the kernels of training."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid_kernels.retention_router.parameters import RouterParameters, RouterState
from megahybrid_kernels.retention_router.triton import forward_layers, router_arguments
from megahybrid_kernels.retention_router.triton_copies import state_rows
from megahybrid_kernels.sequences import Sequences


def retention_scores_first(
    k: Tensor,
    v: Tensor,
    parameters: RouterParameters,
    sequences: Sequences,
    dilation: int = 2,
) -> tuple[Tensor, RouterState]:
    """`retention_scores_streamed` for sequences that begin here, without gradients.

    The scores are those of `retention_scores`, moved; the state's rows have their whole right context here, too.
    """
    layers, k, v, *rest = router_arguments(k, v, parameters, sequences, None, dilation)
    tokens, heads = k.shape[:2]
    late = sum(layer.taps // 2 * dilation for layer in layers)
    # The kernels write `late` rows further on; what then stands where a row means nothing is never read.
    scores = torch.empty(tokens + late, heads, dtype=torch.float32, device=k.device)
    ys = forward_layers(layers, scores[late:], True, k, v, *rest)
    return scores[:tokens], RouterState(state_rows(k, v, ys, list(parameters.weights), sequences, dilation))
