"""The router's first piece of prefill, by the kernels of training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels.retention_router.reference import RouterParameters, RouterState
from megahybrid_kernels.retention_router.triton import forward_layers, router_arguments
from megahybrid_kernels.sequences import Sequences


def retention_logits_first(
    k: Tensor, v: Tensor, parameters: RouterParameters, sequences: Sequences, dilation: int = 2
) -> tuple[Tensor, RouterState]:
    """`retention_logits_streamed` for sequences that begin here, without gradients.

    The logits are those of `retention_logits`, moved; the state's rows have their whole right context here, too.
    """
    layers, k, v, *rest = router_arguments(k, v, parameters, sequences, None, dilation)
    logits, ys = forward_layers(layers, k, v, *rest)
    begins, ends = sequences.cu_seqlens[:-1, None].long(), sequences.cu_seqlens[1:, None].long()
    late, rows = 0, []
    for layer in layers:
        past = (layer.taps - 1) * dilation
        row = ends - late - past + torch.arange(past, device=k.device)
        source = row.clamp(min=0)
        if layer.number == 0:
            x = torch.cat([k[source], v[source]], -1).float()
        else:
            x = F.silu(ys[layer.number - 1][:, source].float()).permute(1, 2, 0, 3)
        rows.append(x.masked_fill((row < begins)[..., None, None], 0).contiguous())
        late += layer.taps // 2 * dilation
    # What comes from the sequence before stands where a row means nothing.
    return logits.roll(late, 0), RouterState(tuple(rows))
