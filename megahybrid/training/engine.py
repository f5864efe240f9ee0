"""One optimizer step: Megatron-core's schedule runs the micro-batches, DeepSpeed's ZeRO reduces, clips and steps."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megahybrid.config.schema import Config
from megahybrid.data.packing import Batch
from megahybrid.model.context import Context, dropout_keys
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid.parallel.mpu import ModelParallelUnit
from megahybrid.training.controller import LambdaController
from megahybrid.training.optimizer import learning_rate, make_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over the whole global batch.

    Attributes:
        loss: mean negative log-likelihood a token, nats.
        retention_loss: the L1 term as it entered the loss.
        grad_norm: norm of the gradient before clipping.
        learning_rate: the learning rate of this step.
    """

    loss: float
    retention_loss: float
    grad_norm: float
    learning_rate: float


class Engine:
    """The model with its optimizer and controller."""

    def __init__(self, config: Config, model: Stack):
        self.config, self.model, self.settings = config, model, model.settings
        self.device = groups.device()
        self.lte_layers = self.settings.pattern.layers("L")
        self.controller = self._make_controller()
        model.config.no_sync_func = contextlib.nullcontext  # DeepSpeed reduces in its step, not in the backward pass
        self.optimizer = make_optimizer(model, config.optimizer)
        self.deepspeed = _deepspeed(config, model, self.optimizer)
        self.set_optimizer_steps(0)
        self.run_schedule = get_forward_backward_func()

    def _make_controller(self) -> LambdaController:
        mixers = [self.model.layers[str(layer)].mixer for layer in self.lte_layers]
        heads = mixers[0].heads if mixers else 0
        train, lte = self.config.train, self.config.model.lte
        controller = LambdaController(lte, train.seq_length, len(mixers), heads, self.device)
        for mixer, row in zip(mixers, controller.lambdas, strict=True):
            mixer.l1_lambda = row
        return controller

    def set_optimizer_steps(self, steps: int) -> None:
        """AdamW's state as after `steps` steps, with moments of zero, linked to the parameters.

        DeepSpeed would link the state in its first step, but then only that of the first parameter group.
        """
        zero = self.deepspeed.optimizer
        for group in zero.optimizer.param_groups:
            for flat in group["params"]:
                moments = {kind: torch.zeros_like(flat.data) for kind in MOMENTS}
                zero.optimizer.state[flat] = {"step": torch.tensor(float(steps)), **moments}
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Train on this replica's micro-batches of the 1-based optimizer step."""
        rate = learning_rate(self.config.optimizer, step, self.config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        reports = self.run_schedule(
            forward_step_func=functools.partial(self._forward, step=step, micro_batches=len(batches)),
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=len(batches[0].tokens),
            micro_batch_size=1,
            forward_only=False,
        )
        self.deepspeed.step()
        positions = sum(self._counted_positions(batch) for batch in batches)
        loss, retention_loss = self._reduce(torch.stack(list(reports)).sum(0), positions, len(batches), step)
        return StepResult(loss, retention_loss, float(self.deepspeed.get_global_grad_norm()), rate)

    def _forward(self, batches, model: Stack, step: int, micro_batches: int):
        batch = next(batches).to(self.device)
        keys = dropout_keys(self.config.train.seed, step, batch.samples, batch.sample_positions)
        out = model(batch.tokens, Context(batch.sequences, keys, 1 / micro_batches))
        loss = model.losses(out.hidden, batch.labels).mean()
        report = [loss.detach().double().clone()]  # a clone: the schedule divides the loss in place
        aux = [out.aux[layer] for layer in self.lte_layers]
        report.append(sum((each.loss.detach().double() for each in aux), torch.zeros_like(report[0])))
        kept = torch.cat([each.kept for each in aux]).double() if aux else report[0].new_zeros(0)
        return loss, lambda output: (output, torch.cat([torch.stack(report), kept]))

    def _counted_positions(self, batch: Batch) -> int:
        """Positions whose right context is whole: those the mixers count."""
        if not self.lte_layers:
            return 0
        margin = self.model.layers[str(self.lte_layers[0])].mixer.margin
        return sum(max(0, length - margin) for length in batch.sequences.lengths)

    def _reduce(self, report: Tensor, positions: int, micro_batches: int, step: int) -> tuple[float, float]:
        """Sum the step's report over replicas (float64: counts stay exact) and hand the counts to the controller."""
        _, replicas = groups.data_parallel()
        report = torch.cat([report, report.new_tensor([positions])])
        total = groups.sum_over_data_parallel(report).cpu()
        self.controller.update(step, total[2:-1].view(self.controller.lambdas.shape), int(total[-1]))
        loss, retention_loss = (total[:2] / (micro_batches * replicas)).tolist()
        return loss, retention_loss

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean negative log-likelihood a token over all replicas' batches, with the eviction cap enforced."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            batch = batch.to(self.device)
            out = self.model(batch.tokens, Context(batch.sequences))
            losses = self.model.losses(out.hidden, batch.labels)
            total += torch.stack([losses.double().sum(), total.new_tensor(float(len(losses)))])
        nats, tokens = groups.sum_over_data_parallel(total).tolist()
        return nats / tokens


def _deepspeed(config: Config, model: Stack, optimizer: torch.optim.Optimizer):
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    train = config.train
    _, replicas = groups.data_parallel()
    settings = {
        # To DeepSpeed the schedule's micro-batches are one: it accumulates, DeepSpeed only steps.
        "train_micro_batch_size_per_gpu": train.global_batch_size // replicas,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": False,
        },
    }
    if train.dtype == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=ModelParallelUnit(), dist_init_required=False
        )
    return engine
