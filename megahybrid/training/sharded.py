"""ZeRO 1 and 2: DeepSpeed's flat weights and masters, a bucket of gradients each, with reductions beside the backward
pass and a step that never asks the host.

DeepSpeed's own optimizers reduce after the backward pass or let the host wait for overflows, norms and clipping; and a
parameter group of theirs is split as a whole, so that a bucket of it belongs to one or two ranks. Here a group is a
bucket, of which every rank has a piece.
"""

from __future__ import annotations

import contextlib
import io
import logging
from types import SimpleNamespace

import torch
from deepspeed import comm
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import logger, safe_get_full_fp32_param, safe_get_full_optimizer_state
from megatron.core import parallel_state
from torch import Tensor, nn

from megahybrid.config.schema import Config
from megahybrid.scaling.memory import BUCKET
from megahybrid.training.optimizer import make_optimizer, reset_state
from megahybrid.training.reduction import Bucket, Reduction, has_sums, in_buckets, travelling
from megahybrid.training.zero import WEIGHTS

# Before and after every group it collects garbage, and prints.
bf16_optimizer.see_memory_usage = lambda *_, **__: None
logger.setLevel(logging.ERROR)


class ShardedOptimizer(BF16_Optimizer):
    """Of working copies in bf16 or fp32; masters, their gradients and moments are fp32.

    Attributes:
        optimizer: of the masters, a parameter group each.
        reduction: of the gradients.
    """

    def __init__(self, config: Config, model: nn.Module):
        """The model's parameters become views of what this owns, without values."""
        comm.init_distributed(dist_init_required=False)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory tables
            super().__init__(
                make_optimizer(in_buckets(model.parameters(), BUCKET), config.optimizer),
                {parameter: name for name, parameter in model.named_parameters()},
                SimpleNamespace(enabled=True, immediate_grad_update=False),
                dp_process_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
                grad_acc_dtype=torch.float32,
            )
        self.reduction = Reduction(self._buckets(config.parallel.zero_stage), travelling(config.parallel))
        self.reset_state(0)

    def _buckets(self, zero_stage: int) -> list[Bucket]:
        """Over DeepSpeed's buffers of gradients, or shards alone."""
        shards, sums = self.fp32_groups_gradient_flat_partition, self.fp32_groups_gradients_flat
        buckets = []
        for parameters, shard, each in zip(self.bf16_groups, shards, sums, strict=True):
            summed = has_sums(parameters, zero_stage)
            buckets.append(Bucket(parameters, shard, each) if summed else Bucket(parameters, shard.clone()))
        self.fp32_groups_gradient_dict.clear()
        views = self.fp32_groups_gradients, self.fp32_groups_actual_gradients_flat, self.non_expert_gradients
        for each in (*views, shards, sums):
            each.clear()
        return buckets

    def reset_state(self, steps: int) -> None:
        """AdamW's state as after `steps` steps, with moments of zero, linked to the parameters."""
        reset_state(self.optimizer, steps)
        self._hp_optimizer_states_linked = False
        self._lazy_init_hp_params_optimizer_state()

    def place(self, parameter: nn.Parameter, kind: str = WEIGHTS) -> tuple[int, Tensor]:
        """Where this rank keeps its shard of a parameter's fp32 weight or moment: a `Place`, perhaps of nothing."""
        if (mapping := parameter._hp_mapping) is None:
            return 0, torch.empty(0)
        shard = mapping.get_hp_fragment(None if kind == WEIGHTS else kind)
        return mapping.lp_fragment_address.start, shard.data

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """This tensor parallel rank's whole fp32 weight or moment; a collective."""
        if kind == WEIGHTS:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def round_masters(self) -> None:
        """Make every working copy of the masters; a collective."""
        self.update_lp_params()

    def destroy(self) -> None:
        """Leave the model alone, whose parameters stay views of what this owned."""
        super().destroy()
        self.reduction.stop()
