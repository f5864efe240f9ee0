"""One optimizer step: micro-batches forward and backward by Megatron-core's schedules, then ZeRO clips and steps."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megahybrid.config.schema import Config
from megahybrid.config.validate import check_replicas
from megahybrid.data.packing import Batch, moved
from megahybrid.devices import gpu_memory
from megahybrid.errors import UserError
from megahybrid.model.context import Context
from megahybrid.model.regulation import Regulator, regulators
from megahybrid.model.stack import Stack, StackOutput, Stages, build_stages
from megahybrid.parallel import groups
from megahybrid.parallel.parameters import initialize_parameters
from megahybrid.scaling.memory import check_room
from megahybrid.scaling.stages import stage_layers
from megahybrid.training import schedule, zero
from megahybrid.training.graphs import Graphs, Inputs
from megahybrid.training.guard import StepGuard
from megahybrid.training.logs import log
from megahybrid.training.metrics_file import OWN_KEYS
from megahybrid.training.optimizer import learning_rate, update
from megahybrid.training.probes import names
from megahybrid.training.schedule import MicroBatch
from megahybrid.training.step_report import StepReport
from megahybrid_kernels import Sequences, dropout_keys


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over the whole global batch.

    Attributes:
        loss: mean negative log-likelihood a token by the labels' weights, nats.
        aux_losses: the auxiliary losses as they entered the loss, by their names in metrics.jsonl.
        grad_norm: norm of the gradient before clipping; inf if it was not finite.
        learning_rate: the learning rate of this step.
        skipped: why the update was left out, or None.
        repeated: whether it was done twice, since a layer left out what it had no room for.
        stop: whether any process was asked to stop.
        saving: whether any process is at work on a checkpoint.
    """

    loss: float
    aux_losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    skipped: str | None
    repeated: bool
    stop: bool
    saving: bool


class Engine:
    """The model with its optimizer, its regulators and the guard against bad steps.

    Attributes:
        stages: this rank's pipeline stages.
        model: one module with all their parameters.
        zero: owner of their values, gradients and the optimizer's state.
        regulators: by letter of the kinds in the pattern that have one.
        graphs: of the passes of steps; None where these are not recorded.
    """

    def __init__(self, config: Config):
        """Without values, which `initialize` or a checkpoint gives. Raises UserError where the micro-batches do not fit
        the pipeline's schedule, or the model the GPU."""
        _, replicas = groups.data_parallel()
        check_replicas(config, replicas)
        check_room(config, replicas, gpu_memory())
        rank, size = groups.pipeline_parallel()
        self.config, self.device = config, groups.device()
        self.stages = stages = build_stages(config, stage_layers(config)[rank::size], "meta")
        self.settings = stages[0].settings
        self.model = stages[0] if len(stages) == 1 else Stages(stages)
        self.graphs = Graphs.of(config, self.device)
        with self._stream():
            self.zero = zero.own(config, self.model)
        self.regulators = self._make_regulators()
        self.guard = StepGuard(config.train.skip)

    def initialize(self) -> None:
        """Give the weights their initial values from (train.seed, parameter name)."""
        initialize_parameters(self.model, self.config.train.seed, self.zero.place)
        self.zero.round_masters()

    def _make_regulators(self) -> dict[str, Regulator]:
        """Those of the whole model; this rank's mixers get to read what they steer."""
        made, taken = {}, set(OWN_KEYS)
        for letter, regulator in regulators(self.settings.pattern).items():
            layers = self.settings.pattern.layers(letter)
            _claim(regulator, letter, self.config, taken)
            made[letter] = regulator.of(self.config, layers, self.device)
            for layer in layers:
                if str(layer) in self.model.layers:
                    made[letter].attach(layer, self.model.layers[str(layer)].mixer)
        return made

    def step(
        self,
        batches: Sequence[Batch],
        step: int,
        stop: bool = False,
        saving: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> StepResult:
        """Train on this replica's micro-batches of the 1-based optimizer step.

        `stop` is this process's wish to stop, `saving` whether it is at work on a checkpoint; the result says
        whether any process is. `meanwhile` is called when the device has all its work.
        """
        with self._stream():
            return self._step(batches, step, stop, saving, meanwhile or _nothing)

    def _stream(self) -> contextlib.AbstractContextManager[None]:
        return self.graphs.stream() if self.graphs else contextlib.nullcontext()

    def _step(
        self, batches: Sequence[Batch], step: int, stop: bool, saving: bool, meanwhile: Callable[[], None]
    ) -> StepResult:
        rate = learning_rate(self.config.optimizer, step, self.config.train.steps)
        for group in self.zero.optimizer.param_groups:
            group["lr"] = rate
        report = self._passes_and_update(batches, step, stop, saving, whole=False)
        norm = self._wait(report, meanwhile)
        repeated = bool(report.void())
        if repeated:
            log.info("Step %d is done again: a layer left out what it had no room for.", step)
            void = report
            report = self._passes_and_update(batches, step, stop, saving, whole=True)
            norm = self._wait(report, meanwhile)
            report.take_left_out(void)
        loss, micro_batches = float(report.loss), len(batches) * groups.data_parallel()[1]
        skipped = self.guard.reason(loss, norm)
        aux_losses, longest = {}, int(report.longest.max())
        for letter, regulator in self.regulators.items():
            regulator.update(step, None if skipped else report.counts[letter], longest)
            aux_losses[f"{regulator.name}_loss"] = float(report.aux_loss[letter]) / micro_batches
        self.guard.record(loss, norm, skipped)
        stop, saving = bool(report.stop), bool(report.saving)
        return StepResult(loss, aux_losses, norm, rate, skipped, repeated, stop, saving)

    def _passes_and_update(
        self, batches: Sequence[Batch], step: int, stop: bool, saving: bool, whole: bool
    ) -> StepReport:
        """All that a step does on the device, and what it will report. Where that is `void`, nothing has changed;
        `whole` passes never are."""
        divisor = self._divisor(batches)
        # On this thread: handing Python's lock to autograd's and back costs the host time for nothing.
        with torch.autograd.set_multithreading_enabled(False):
            if self.graphs and not whole:
                report = self.graphs.run([self._inputs(batch, step) for batch in batches], divisor, self._passes)
            else:
                report = self._passes(batches, divisor, lambda batch: self._inputs(batch, step), whole)
        report.tell(stop, saving, max(max(batch.sequences.lengths) for batch in batches))
        if (micro_batches := len(batches) * groups.data_parallel()[1]) > 1:
            report.loss /= micro_batches
        self._update(report)
        return report

    def _update(self, report: StepReport) -> None:
        """From the gradients to the new weights or, where the guard says so or the step is void, to the old ones, all
        on the device."""
        report.sum_over_all()
        norm = report.squares.sqrt_()
        if (holders := groups.weight_holders()[1]) > 1:
            norm /= holders
        shards = [bucket.shard for bucket in self.zero.reduction.buckets]
        refused = self.guard.refuses(report.judged)
        update(self.zero.optimizer, shards, norm, refused, self.config.optimizer.clip_grad_norm)
        self.zero.round_masters()

    def _wait(self, report: StepReport, meanwhile: Callable[[], None]) -> float:
        """Have the report on the host, the only wait of a step, and `meanwhile` done before. The gradient's norm."""
        meanwhile()
        report.to_host()
        norm = float(report.squares)
        return norm if math.isfinite(norm) else math.inf

    def _passes(
        self,
        micro_batches: Sequence[MicroBatch],
        divisor: float | Tensor,
        inputs: Callable[[MicroBatch], Inputs] = lambda inputs: inputs,
        whole: bool = False,
    ) -> StepReport:
        """All micro-batches forward and backward, whose `inputs` are made when they are needed; what they report, the
        gradient's square too."""
        report = StepReport(self.settings.pattern.letters, self.regulators, self.device)

        def forward(model, micro_batch: MicroBatch) -> Tensor:
            return self._forward(model, inputs(micro_batch), len(micro_batches), divisor, report, whole)

        self.zero.reduction.begin(len(micro_batches))
        schedule.run(self.stages, micro_batches, len(micro_batches[0].tokens), forward)
        report.squares += self.zero.reduction.finish()
        return report

    def _inputs(self, batch: Batch, step: int) -> Inputs:
        """What a micro-batch's passes read, on this rank's device."""
        batch = batch.part(*groups.context_parallel()).to(self.device)
        layers = len(self.settings.pattern.letters)
        keys = dropout_keys(batch.samples, batch.sample_positions, self.config.train.seed, step, layers)
        return Inputs(batch.tokens, batch.labels, batch.sequences, keys, batch.weights)

    def _divisor(self, batches: Sequence[Batch]) -> float | Tensor:
        """What a micro-batch's loss is divided by, on the way to the mean over all labels of the step by their weights:
        the mean sum of a micro-batch's weights, since schedules and ZeRO take the mean over micro-batches and replicas.

        A sum of 0, where no label counts, leaves a loss and gradients of 0.
        """
        if batches[0].weights is None:
            return self.config.train.micro_batch_size * self.config.train.seq_length
        total = torch.stack([batch.weights.sum(dtype=torch.float64) for batch in batches]).sum()
        replicas = groups.data_parallel()[1]
        if replicas > 1:
            total = groups.sum_over_replicas(moved(total, self.device))
        total = total / (len(batches) * replicas)
        return moved(torch.where(total > 0, total, 1).float(), self.device)

    def _forward(
        self, model, inputs: Inputs, micro_batches: int, divisor: float | Tensor, report: StepReport, whole: bool
    ) -> Tensor:
        """A micro-batch through one stage: its hidden states, or its loss where the stage is the last one, of this
        context parallel rank's tokens."""
        _, ranks = groups.context_parallel()
        context = Context(inputs.sequences, inputs.dropout_keys, ranks / micro_batches, whole=whole)
        out = model(inputs.tokens, context, labels=inputs.labels, weights=inputs.weights)
        for layer, aux in out.aux.items():
            report.add(layer, aux)
        if out.losses is None:
            return out.hidden
        loss = out.loss / divisor
        if groups.tensor_parallel()[0] == 0:
            report.loss += loss.detach() if self.config.train.z_loss == 0 else _weighted(out, inputs.weights) / divisor
        return loss

    @torch.no_grad()
    def validate(self, batches: Collection[Batch], ends: Sequence[int] = ()) -> list[float | None]:
        """Mean negative log-likelihoods a token over all replicas' batches, by the rules of inference: of all their
        samples, and of each source's, the indices of whose samples end before one of `ends`, which rise.

        Replicas may hold unequally many batches, or none; of what has no sample there is nothing to say: None.
        """
        total = torch.zeros(1 + len(ends), 2, dtype=torch.float64, device=self.device)
        begins = [0, *ends]

        def forward(stage: Stack, batch: Batch) -> StackOutput:
            rank, ranks = groups.context_parallel()
            batch = batch.part(rank, ranks).to(self.device)
            out = stage(batch.tokens, Context(batch.sequences), labels=batch.labels)
            if out.losses is not None and groups.tensor_parallel()[0] == 0:
                samples, losses = batch.samples.chunk(ranks)[rank], out.losses.double()
                own = [(samples >= begin) & (samples < end) for begin, end in itertools.pairwise(begins)]
                of = torch.stack([torch.ones_like(samples, dtype=torch.bool), *own])
                total.add_(torch.stack([losses.where(of, 0).sum(1), of.sum(1).double()], 1))
            return out

        self.look(batches, forward)
        return [nats / tokens if tokens else None for nats, tokens in groups.sum_over_all(total).tolist()]

    @torch.no_grad()
    def look(self, batches: Collection[MicroBatch], forward: Callable[[Stack, MicroBatch], StackOutput]) -> None:
        """Forward passes alone over this replica's micro-batches, in any layout.

        Replicas may hold unequally many batches, or none; all processes have to call this.

        Args:
            batches: each with its `tokens` `[T]`.
            forward: takes one, this context parallel rank's part, through a stage of this rank, with labels, so that
                the last stage has a loss.
        """

        def step(stage: Stack, batch: MicroBatch | None, filler: Batch) -> Tensor:
            if batch is None:
                out = stage(filler.tokens, Context(filler.sequences), labels=filler.labels)
            else:
                out = forward(stage, batch)
            return out.hidden if out.loss is None else out.loss

        for group, tokens in self._groups(batches):
            filler = _zeros(tokens).part(*groups.context_parallel()).to(self.device)
            schedule.run(self.stages, group, tokens, functools.partial(step, filler=filler), backward=False)

    def _groups(self, batches: Collection[MicroBatch]) -> Iterator[tuple[list[MicroBatch | None], int]]:
        """The batches as the schedules can take them, None for one that does not count, and their tokens.

        A pipeline passes on tensors of one size, and an interleaved one a multiple of its size. With ZeRO-3 a forward
        pass is a collective of all replicas: who has no batch left runs one that does not count.
        """
        if self.config.parallel.pipeline == 1:
            missing = groups.max_over_all(len(batches)) - len(batches)
            if group := [*batches, *[None] * missing]:
                yield group, self.config.parallel.replica
            return
        multiple = self.config.parallel.pipeline if len(self.stages) > 1 else 1
        for tokens, same in itertools.groupby(batches, key=lambda batch: len(batch.tokens)):
            group = list(same)
            yield group + [None] * (-len(group) % multiple), tokens


def _claim(regulator: type[Regulator], letter: str, config: Config, taken: set[str]) -> None:
    """Add a regulator's keys in metrics.jsonl to those that are taken. Raises UserError where one is."""
    for name in (f"{regulator.name}_loss", *(quantity.key for quantity in regulator.quantities(config))):
        if name in taken or name.startswith(names.PREFIX):
            raise UserError(f"The mixer '{letter}' regulates '{name}', which metrics.jsonl has of others; rename it.")
        taken.add(name)


def _nothing() -> None:
    """Where there is nothing to do meanwhile."""


def _weighted(out: StackOutput, weights: Tensor | None) -> Tensor:
    """The sum of losses by their weights, without what train.z_loss adds."""
    return (out.losses if weights is None else out.losses * weights).sum()


def _zeros(tokens: int) -> Batch:
    zeros = torch.zeros(tokens, dtype=torch.int64)
    return Batch(zeros, zeros, Sequences.of([tokens]), zeros, zeros)
