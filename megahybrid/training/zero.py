"""DeepSpeed as the owner of gradients' reduction and of the optimizer's sharded state (ZeRO 1, 2 and 3)."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
from torch import Tensor, nn

from megahybrid.config.batch import micro_batches
from megahybrid.config.schema import Config
from megahybrid.parallel import groups
from megahybrid.parallel.mpu import ModelParallelUnit
from megahybrid.parallel.parameters import materialize
from megahybrid.scaling.memory import BUCKET, LIVE_PARAMETERS

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHTS, *MOMENTS)


def make_parameters(config: Config, model: nn.Module) -> None:
    """Make the working copies of a model on the meta device, without values. With stage 3 they are split over the
    replicas a layer at a time, so that none ever has them all.
    """
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    for module in [*model.layers.values(), *(each for name, each in model.named_children() if name != "layers")]:
        materialize(module, groups.device(), dtype)
        if config.parallel.zero_stage == 3:
            import deepspeed

            deepspeed.zero.Init(module, ModelParallelUnit().get_data_parallel_group(), dtype=dtype)


def initialize(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's engine around the model, its optimizer state made and linked. Neither masters nor working copies have
    values until the former get theirs through `place` and the latter by `round_masters`.

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
        state = zero.optimizer.state[flat]
        state["step"] = torch.tensor(float(steps))
        for kind in MOMENTS:
            state[kind] = state[kind].zero_() if kind in state else torch.zeros_like(flat.data)
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


def place(engine: Any, parameter: nn.Parameter, kind: str = WEIGHTS) -> tuple[int, Tensor]:
    """Where this replica keeps its shard of a parameter's fp32 weight or moment: a `Place`, perhaps of nothing."""
    key = None if kind == WEIGHTS else kind
    if engine.zero_optimization_stage() == 3:
        shard, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)
        begin = engine.optimizer._get_param_partition_rank(parameter) * shard.numel()
        return begin, shard.data.view(-1)[: max(0, parameter.ds_numel - begin)]
    if (mapping := parameter._hp_mapping) is None:
        return 0, torch.empty(0)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).data


def round_masters(engine: Any) -> None:
    """Make every working copy of the masters, as after a step; a collective."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    for copies, masters in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
        copies.data.copy_(masters.data)
    if small := zero.persistent_parameters:  # which stay gathered
        small[0].partition(small)
        small[0].all_gather(small)
