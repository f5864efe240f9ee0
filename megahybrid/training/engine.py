"""One optimizer step: the micro-batches forward and backward, then ZeRO reduces, clips and steps.

With ZeRO-1 Megatron-core's schedule runs the micro-batches, with ZeRO-2 and 3 DeepSpeed's engine does.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megahybrid.config.schema import Config
from megahybrid.data.packing import Batch
from megahybrid.model.context import Context, dropout_keys
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid.training import zero
from megahybrid.training.controller import LambdaController
from megahybrid.training.guard import StepGuard
from megahybrid.training.optimizer import learning_rate, make_optimizer
from megahybrid_kernels import Sequences


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over the whole global batch.

    Attributes:
        loss: mean negative log-likelihood a token, nats.
        retention_loss: the L1 term as it entered the loss.
        grad_norm: norm of the gradient before clipping; inf if it was not finite.
        learning_rate: the learning rate of this step.
        skipped: why the update was left out, or None.
        stop: whether any process was asked to stop.
    """

    loss: float
    retention_loss: float
    grad_norm: float
    learning_rate: float
    skipped: str | None
    stop: bool


class Engine:
    """The model with its optimizer, its lambda controller and the guard against bad steps."""

    def __init__(self, config: Config, model: Stack):
        self.config, self.model, self.settings = config, model, model.settings
        self.device = groups.device()
        self.lte_layers = self.settings.pattern.layers("L")
        self.controller = self._make_controller()
        self.guard = StepGuard(config.train.skip)
        model.config.no_sync_func = contextlib.nullcontext  # DeepSpeed reduces in its step, not in the backward pass
        self.optimizer = make_optimizer(model, config.optimizer)
        self.optimizer.accept = self._accept
        self.deepspeed = zero.initialize(config, model, self.optimizer)
        self._loss = 0.0

    def _make_controller(self) -> LambdaController:
        mixers = [self.model.layers[str(layer)].mixer for layer in self.lte_layers]
        heads = mixers[0].heads if mixers else 0
        train, lte = self.config.train, self.config.model.lte
        controller = LambdaController(lte, train.seq_length, len(mixers), heads, self.device)
        for mixer, row in zip(mixers, controller.lambdas, strict=True):
            mixer.l1_lambda = row
        return controller

    def step(self, batches: Sequence[Batch], step: int, stop: bool = False) -> StepResult:
        """Train on this replica's micro-batches of the 1-based optimizer step.

        `stop` is this process's wish to stop; the result says whether any process has it.
        """
        rate = learning_rate(self.config.optimizer, step, self.config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        forward = functools.partial(self._forward, step=step, micro_batches=len(batches))
        run = self._run_schedule if self.config.parallel.zero_stage == 1 else self._run_deepspeed
        report = torch.stack(run(batches, forward)).sum(0)
        report[2] = sum(self._counted_positions(batch) for batch in batches)
        report[3] = stop
        # In float64, where counts stay exact.
        total = groups.sum_over_data_parallel(report).cpu()
        _, replicas = groups.data_parallel()
        self._loss, retention_loss = (total[:2] / (len(batches) * replicas)).tolist()
        self.deepspeed.step()
        norm = zero.grad_norm(self.deepspeed)
        skipped = self.guard.reason(self._loss, norm)
        kept = total[4:].view(self.controller.lambdas.shape)
        self.controller.update(step, kept, 0 if skipped else int(total[2]))
        self.guard.record(self._loss, norm, skipped)
        return StepResult(self._loss, retention_loss, norm, rate, skipped, bool(total[3]))

    def _accept(self) -> bool:
        """Called between the gradient's norm and the optimizer's update."""
        return self.guard.reason(self._loss, zero.grad_norm(self.deepspeed)) is None

    def _run_schedule(self, batches: Sequence[Batch], forward) -> list[Tensor]:
        def step_function(iterator, model):
            loss, report = forward(next(iterator), model)
            return loss, lambda output: (output, report)

        return get_forward_backward_func()(
            forward_step_func=step_function,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=len(batches[0].tokens),
            micro_batch_size=1,
            forward_only=False,
        )

    def _run_deepspeed(self, batches: Sequence[Batch], forward) -> list[Tensor]:
        reports = []
        for number, batch in enumerate(batches, start=1):
            loss, report = forward(batch, self.deepspeed)
            self.deepspeed.backward(loss)
            if number < len(batches):  # the last one is the caller's
                self.deepspeed.step()
            reports.append(report)
        return reports

    def _forward(self, batch: Batch, model, step: int, micro_batches: int) -> tuple[Tensor, Tensor]:
        """A micro-batch's loss, and its report: loss, L1 term, two places for `step`, kept counts."""
        batch = batch.to(self.device)
        keys = dropout_keys(self.config.train.seed, step, batch.samples, batch.sample_positions)
        out = model(batch.tokens, Context(batch.sequences, keys, 1 / micro_batches), labels=batch.labels)
        loss = out.losses.mean()
        aux = [out.aux[layer] for layer in self.lte_layers]
        retention = sum((each.loss.detach().double() for each in aux), out.losses.new_zeros((), dtype=torch.float64))
        report = torch.stack([loss.detach().double(), retention, *2 * [torch.zeros_like(retention)]])
        report = torch.cat([report, *(each.kept.double() for each in aux)])
        if self.config.train.z_loss:
            loss = loss + self.config.train.z_loss * out.normalisers.square().mean()
        return loss, report

    def _counted_positions(self, batch: Batch) -> int:
        """Positions whose right context is whole: those the mixers count."""
        if not self.lte_layers:
            return 0
        margin = self.model.layers[str(self.lte_layers[0])].mixer.margin
        return sum(max(0, length - margin) for length in batch.sequences.lengths)

    @torch.no_grad()
    def validate(self, batches: Collection[Batch]) -> float | None:
        """Mean negative log-likelihood a token over all replicas' batches, with the eviction cap enforced.

        Replicas may hold unequally many batches, or none; with no batch at all there is nothing to say: None.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        rounds = groups.max_over_data_parallel(len(batches))
        # With ZeRO-3 a forward pass is collective: who has no batch left runs one that does not count.
        filler = itertools.repeat(None, rounds - len(batches))
        for batch in itertools.chain(batches, filler):
            counted, batch = batch is not None, (batch or _one_token()).to(self.device)
            out = self.model(batch.tokens, Context(batch.sequences), labels=batch.labels)
            total += counted * torch.stack([out.losses.double().sum(), total.new_tensor(float(len(out.losses)))])
        nats, tokens = groups.sum_over_data_parallel(total).tolist()
        return nats / tokens if tokens else None


def _one_token() -> Batch:
    zero = torch.zeros(1, dtype=torch.int64)
    return Batch(zero, zero, Sequences.of([1]), zero, zero)
