"""DeepSpeed as the owner of the optimizer's sharded state (ZeRO 1, 2, 3), and with stage 3 of gradients' reduction."""

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
from megahybrid.scaling.memory import BUCKET, LIVE_PARAMETERS, STAGE_3_BUCKET
from megahybrid.training.reduction import in_buckets

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


def parameter_groups(config: Config, model: nn.Module) -> list[list[nn.Parameter]]:
    """The model's parameters as `initialize` wants them in the optimizer's groups."""
    parameters = list(model.parameters())
    if config.parallel.zero_stage < 3:
        return in_buckets(parameters, BUCKET)
    return [[each for each in parameters if each.spec.weight_decay is decayed] for decayed in (True, False)]


def initialize(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """The owner of the model's gradients and optimizer state, which is made and linked: a ShardedOptimizer, with stage
    3 DeepSpeed's engine. Neither masters nor working copies have values until the former get theirs through `place` and
    the latter by `round_masters`.
    """
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
        owner = (_engine if config.parallel.zero_stage == 3 else _sharded)(config, model, optimizer)
    reset_optimizer_state(owner, 0)
    return owner


def _sharded(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    from deepspeed import comm

    from megahybrid.training.sharded import ShardedOptimizer

    comm.init_distributed(dist_init_required=False)
    return ShardedOptimizer(config, model, optimizer)


def _engine(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's, which sees every micro-batch, and reduces its gradients at once."""
    import deepspeed

    train = config.train
    settings = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches(config, groups.data_parallel()[1]),
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "communication_data_type": config.parallel.gradient_reduction,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it makes the host wait for the GPU before every micro-batch
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "contiguous_gradients": False,
            "reduce_bucket_size": STAGE_3_BUCKET,
            "stage3_max_live_parameters": LIVE_PARAMETERS,
            "leaf_module": {"classes": ["megahybrid.model.block.Block"]},  # stage 3 gathers whole layers at once
        },
    }
    if train.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, mpu=ModelParallelUnit(), dist_init_required=False
    )
    return engine


def reset_optimizer_state(owner: Any, steps: int) -> None:
    """AdamW's state as after `steps` steps, with moments of zero, linked to the parameters.

    DeepSpeed makes the state in its first step.
    """
    sharded = owner.zero_optimization_stage() < 3
    zero = owner if sharded else owner.optimizer
    for flat in zero.fp32_groups_flat_partition if sharded else zero.fp32_partitioned_groups_flat:
        state = zero.optimizer.state[flat]
        state["step"] = torch.full((), float(steps), device=flat.device)  # where a fused AdamW has it
        for kind in MOMENTS:
            state[kind] = state[kind].zero_() if kind in state else torch.zeros_like(flat.data)
    if sharded:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def grad_norm(engine: Any) -> float:
    """With stage 3, the norm of the last gradient before clipping, known before the optimizer's update; inf if it was
    not finite."""
    return float(engine.optimizer._global_grad_norm)


def read(owner: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    """This tensor parallel rank's whole fp32 weight or moment, from the data parallel shards; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind == WEIGHTS:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def place(owner: Any, parameter: nn.Parameter, kind: str = WEIGHTS) -> tuple[int, Tensor]:
    """Where this replica keeps its shard of a parameter's fp32 weight or moment: a `Place`, perhaps of nothing."""
    key = None if kind == WEIGHTS else kind
    if owner.zero_optimization_stage() == 3:
        shard, _ = owner.optimizer._get_fp32_opt_state_partition(parameter, False, key)
        begin = owner.optimizer._get_param_partition_rank(parameter) * shard.numel()
        return begin, shard.data.view(-1)[: max(0, parameter.ds_numel - begin)]
    if (mapping := parameter._hp_mapping) is None:
        return 0, torch.empty(0)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).data


def round_masters(owner: Any) -> None:
    """Make every working copy of the masters, as after a step; a collective."""
    if owner.zero_optimization_stage() < 3:
        owner.update_lp_params()
        return
    zero = owner.optimizer
    for copies, masters in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
        copies.data.copy_(masters.data)
    if small := zero.persistent_parameters:  # which stay gathered
        small[0].partition(small)
        small[0].all_gather(small)
