"""ZeRO 1 and 2: DeepSpeed's flat weights and masters, a bucket of gradients each, with reductions beside the backward
pass and a step that never asks the host.

DeepSpeed's own optimizers reduce after the backward pass or let the host wait for overflows, norms and clipping; and a
parameter group of theirs is split as a whole, so that a bucket of it belongs to one or two ranks. Here a group is a
bucket, of which every rank has a piece.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from megatron.core import parallel_state
from torch import Tensor, nn

from megahybrid.config.schema import Config
from megahybrid.parallel import groups
from megahybrid.training.reduction import Bucket, Reduction

# Before and after every group it collects garbage, and prints.
bf16_optimizer.see_memory_usage = lambda *_, **__: None


class ShardedOptimizer(BF16_Optimizer):
    """Of working copies in bf16 or fp32; masters, their gradients and moments are fp32.

    Attributes:
        reduction: of the gradients.
    """

    def __init__(self, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer):
        """`optimizer` is a fused one, whose parameter groups are buckets (reduction.py)."""
        super().__init__(
            optimizer,
            {parameter: name for name, parameter in model.named_parameters()},
            SimpleNamespace(enabled=True, immediate_grad_update=False),
            dp_process_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            grad_acc_dtype=torch.float32,
        )
        self._stage, self._clip = config.parallel.zero_stage, config.optimizer.clip_grad_norm
        travels = torch.bfloat16 if config.parallel.gradient_reduction == "bf16" else torch.float32
        self.reduction = Reduction(self._buckets(), travels)
        self._grad_acc_hooks = self.reduction.hooks  # which `destroy` removes

    def _buckets(self) -> list[Bucket]:
        """Over DeepSpeed's buffers of gradients, or with ZeRO-2 over shards alone. Partial gradients, which are few,
        always have their sums."""
        shards, sums = self.fp32_groups_gradient_flat_partition, self.fp32_groups_gradients_flat
        buckets = []
        for parameters, shard, each in zip(self.bf16_groups, shards, sums, strict=True):
            sharded = self._stage == 2 and not parameters[0].partial
            buckets.append(Bucket(parameters, shard.clone()) if sharded else Bucket(parameters, shard, each))
        self.fp32_groups_gradient_dict.clear()
        views = self.fp32_groups_gradients, self.fp32_groups_actual_gradients_flat, self.non_expert_gradients
        for each in (*views, shards, sums):
            each.clear()
        return buckets

    def zero_optimization_stage(self) -> int:
        """As DeepSpeed's engine, which stage 3 has in this one's place."""
        return self._stage

    @torch.no_grad()
    def update(self, norm: Tensor, accepted: Tensor) -> None:
        """Clip, step and give every replica the new working copies; nothing but the last where not accepted.

        Args:
            norm: of the gradient, the replicas' mean; on the device.
            accepted: bool, on the device.
        """
        scale = ((norm + 1e-6) / self._clip).clamp(min=1) if self._clip else torch.ones_like(norm)
        self.optimizer.grad_scale = (scale * groups.weight_holders()[1]).float()  # what gradients are divided by
        self.optimizer.found_inf = (~accepted).float()
        for master, bucket in zip(self.fp32_groups_flat_partition, self.reduction.buckets, strict=True):
            master.grad = bucket.shard
        self.optimizer.step()
        self.update_lp_params()
