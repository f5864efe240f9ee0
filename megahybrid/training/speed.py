"""Model FLOP utilisation and memory of a training step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megahybrid.devices import peak_flops
from megahybrid.parallel import groups


def model_flops_utilization(flops_per_token: float, tokens_per_second: float) -> dict[str, float]:
    """`{"mfu": …}`: the model's FLOPs a second, as `plan` counts them, over the GPUs' peak; {} on an unknown device."""
    peak = peak_flops()
    return {} if peak is None else {"mfu": tokens_per_second * flops_per_token / (peak * dist.get_world_size())}


def memory(replayed: bool) -> dict[str, Any]:
    """`{"memory_bytes": …}`: the most GPU memory that any process has had allocated, or reserved where passes are
    replayed, which allocate nothing; {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    most = torch.cuda.max_memory_reserved if replayed else torch.cuda.max_memory_allocated
    return {"memory_bytes": groups.max_over_all(most())}
