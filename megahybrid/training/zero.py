"""DeepSpeed as the owner of gradients' reduction and of the optimizer's sharded state (ZeRO 1, 2 and 3)."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
from torch import Tensor, nn

from megahybrid.config.schema import Config
from megahybrid.parallel import groups
from megahybrid.parallel.mpu import ModelParallelUnit
from megahybrid.scaling.memory import BUCKET, LIVE_PARAMETERS
from megahybrid.scaling.schedule import micro_batches

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHTS, *MOMENTS)


def initialize(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's engine around the model, its optimizer state made and linked. Masters of bf16 weights are rounded to
    bf16 until `write` puts others in their place.

    With stage 1 a schedule runs all micro-batches of a step by itself: to DeepSpeed they are one. With stages 2 and 3
    DeepSpeed sees every micro-batch, and reduces its gradients at once.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    train, stage = config.train, config.parallel.zero_stage
    count = micro_batches(config, groups.data_parallel()[1])
    settings = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size * (count if stage == 1 else 1),
        "gradient_accumulation_steps": 1 if stage == 1 else count,
        "managed_gradient_accumulation": stage > 1,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "communication_data_type": config.parallel.gradient_reduction,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it makes the host wait for the GPU before every micro-batch
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": False,
            "reduce_bucket_size": BUCKET,
            "stage3_max_live_parameters": LIVE_PARAMETERS,
            "leaf_module": {"classes": ["megahybrid.model.block.Block"]},  # stage 3 gathers whole layers at once
        },
    }
    if train.dtype == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": stage == 1}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=ModelParallelUnit(), dist_init_required=False
        )
    if train.dtype == "bf16" and stage == 1:
        _accumulate_without_copies(engine.optimizer)
    reset_optimizer_state(engine, 0)
    return engine


def _accumulate_without_copies(optimizer: Any) -> None:
    """Add bf16 gradients to their fp32 sums at once: DeepSpeed's way casts each to a copy of its own first."""

    def update(parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        total = optimizer.fp32_groups_gradients[group][index]
        total.add_(parameter.grad.view(total.shape))
        parameter._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True

    optimizer._update_hp_grad = update


def reset_optimizer_state(engine: Any, steps: int) -> None:
    """AdamW's state as after `steps` steps, with moments of zero, linked to the parameters.

    DeepSpeed makes the state in its first step; with stages 1 and 2 it then links only the first parameter group's.
    """
    zero = engine.optimizer
    sharded = engine.zero_optimization_stage() == 3
    flats = (
        zero.fp32_partitioned_groups_flat if sharded else [p for g in zero.optimizer.param_groups for p in g["params"]]
    )
    for flat in flats:
        moments = {kind: torch.zeros_like(flat.data) for kind in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.tensor(float(steps)), **moments}
    if not sharded:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def grad_norm(engine: Any) -> float:
    """Norm of the last gradient before clipping, known before the optimizer's update; inf if it was not finite."""
    return float(engine.optimizer._global_grad_norm)


def read(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    """This tensor parallel rank's whole fp32 weight or moment, from the data parallel shards; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind == WEIGHTS:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def write(engine: Any, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """Put a whole fp32 weight or moment into the shards, and a weight into the working copy too."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if engine.zero_optimization_stage() == 3:
        # DeepSpeed's own setter fails where a parameter does not divide by the ranks.
        key = None if kind == WEIGHTS else kind
        shard, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)
        rank = engine.optimizer._get_param_partition_rank(parameter)
        _copy_part(shard, value, rank)
        if kind == WEIGHTS:
            _copy_part(parameter.ds_tensor, value, rank)
            if parameter.data.shape == value.shape:  # small parameters stay gathered
                parameter.data.copy_(value)
    elif kind == WEIGHTS:
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _copy_part(shard: Tensor, value: Tensor, rank: int) -> None:
    part = value.flatten()[rank * shard.numel() :][: shard.numel()]
    shard.data.flatten()[: part.numel()].copy_(part)
