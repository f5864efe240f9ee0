"""The training loop: data, steps, validation, metrics and checkpoints, from wherever the run stands."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megahybrid.config import Config, load_config, save_config
from megahybrid.data.loader import TrainingData, validation_batches
from megahybrid.devices import DTYPES, prepare_allocator
from megahybrid.errors import UserError
from megahybrid.model.fallbacks import kernel_notes
from megahybrid.model.regulation import filled
from megahybrid.parallel import groups
from megahybrid.parallel.peers import PeerWatch
from megahybrid.parallel.self_check import self_check
from megahybrid.retry import retry
from megahybrid.scaling.flops import flops_per_token
from megahybrid.scaling.memory import peak_bytes
from megahybrid.training import attempts, checkpoint, checkpoint_folder, failures, tracking
from megahybrid.training.checkpoint import Position
from megahybrid.training.engine import Engine, StepResult
from megahybrid.training.logs import log, rank_log
from megahybrid.training.metrics_file import MetricsFile
from megahybrid.training.opening import opening, rate_jump, unvalidated
from megahybrid.training.ownership import Owner
from megahybrid.training.probes import names
from megahybrid.training.probes.suite import Probes
from megahybrid.training.resume import Start, initial_weights
from megahybrid.training.run_directory import RunDirectory, duration
from megahybrid.training.saver import Saver
from megahybrid.training.signals import NAMES, StopRequest
from megahybrid.training.speed import memory, model_flops_utilization
from megahybrid.training.tracing import Tracing
from megahybrid.training.tracking import Tracker
from megahybrid.training.watchdog import Watchdog

Report = Callable[[str], None]

_SECONDS_BETWEEN_STATUS = 10.0


def train(config: Config, report: Report = print, stop_request: StopRequest | None = None) -> None:
    """Train the configuration to its last step, from its newest checkpoint if there is one.

    SIGTERM, SIGINT or SIGUSR1 to any process, also noted earlier by `stop_request`, ends the step in hand, saves, and
    returns; the same call goes on. Raises UserError for what the configuration, the data or a checkpoint make
    impossible, MachineFault for what may succeed when it is started again, and KeyboardInterrupt for a second SIGINT.
    """
    run, watch = RunDirectory(config.run.dir), config.train.watch
    longest = max(watch.start_seconds, watch.step_seconds) + 120  # the watchdog tells more than a collective's timeout
    prepare_allocator(config.train.cuda_graph)
    groups.initialize(config.parallel, config.train.seed, watch.join_seconds, longest)
    run.by_hand = groups.broadcast(run.by_hand)
    say, trainer = report if groups.is_main() else _nothing, None

    def record(cause: BaseException) -> None:
        failures.record(run, cause, trainer.position.step if trainer else None)

    with contextlib.ExitStack() as resources:
        peers = resources.enter_context(PeerWatch(record))
        try:
            owner = resources.enter_context(Owner(run))
            if "MEGAHYBRID_SUBMISSION" not in os.environ:  # several starts by hand may share a job, and its number
                groups.on_main(lambda: retry(lambda: failures.forget(run), f"Writing to {run.logs}"))
            start = groups.on_main(lambda: retry(lambda: _start(run, config), f"Reading {run.path}"))
            step = 0
            if start.checkpoint is not None:
                retry(lambda: start.check(config), f"Reading {start.checkpoint}")
                step = checkpoint.read_state(start.checkpoint)["position"]["step"]
                if step >= config.train.steps:
                    steps = config.train.steps
                    say(f"{run.path} has done {step} steps, and train.steps is {steps}; a larger one goes on.")
                    return
            _, world = groups.world()
            own = 0 if start.branches else step
            if fault := groups.on_main(lambda: attempts.begin(run, own, world, watch.restarts)):
                raise UserError(fault)
            stop_request = stop_request or resources.enter_context(StopRequest())
            trainer = Trainer(config, run, owner, start, say, stop_request, resources)
            trainer.run_until_told()
        except BaseException as error:
            log.info("Ended by an error.", exc_info=True)
            cause = peers.explain(error)
            log.info(failures.describe(cause))
            if trainer is not None or not failures.is_refusal(cause):
                record(cause)
            if cause is error:
                raise
            raise cause from error


def _start(run: RunDirectory, config: Config) -> Start:
    """Where the run goes on: a step back is taken once a submission."""
    step = config.train.resume_from
    return Start.of(config, None if step is None or attempts.has_gone_back(run, step) else step)


class Trainer:
    """A run in progress: built at the position of a checkpoint, or at the start."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        owner: Owner,
        start: Start,
        say: Report,
        stop_request: StopRequest,
        resources: contextlib.ExitStack,
    ):
        self.config, self.run, self.owner, self.say, self.stop_request = config, run, owner, say, stop_request
        replica, replicas = groups.data_parallel()
        # Data first: what is wrong with it is found before anything is written.
        self.data = resources.enter_context(TrainingData(config, replica, replicas))
        self.validation = resources.enter_context(validation_batches(config, replica, replicas))
        self.probes = Probes(config, self.data.opened.vocabulary) if config.evaluate.every else None
        self.position = self._check_data(start)
        self.tracing = Tracing(config.train.trace, run.traces, *groups.world(), self._tell)
        resources.enter_context(rank_log(run.logs))
        self.watchdog = resources.enter_context(Watchdog(run, config.train.watch, groups.world()[0]))
        for line in [*opening(config), *unvalidated(self.data.opened, self.validation, config)]:
            self._tell(line)
        self_check(max(peak_bytes(config, replicas)))
        self.engine = self._build(start.checkpoint)
        if start.checkpoint is not None:
            self._load(start)
        owner.check()
        groups.on_main(lambda: retry(lambda: self._go_on_from_here(start), f"Writing to {run.path}"))
        self.metrics = MetricsFile(run.metrics, owner.check_here)
        own_steps = 0 if start.branches else self.position.step
        self.tracker = Tracker(config if groups.is_main() else None, self.position.tracking_id, own_steps)
        resources.callback(self.tracker.finish)
        self.saver = Saver(run.checkpoints, self.engine, self.data.opened.tokenizer_json, owner, self.metrics.write)
        if self.probes is not None:
            self._tell(str(self.probes))
        self.flops_per_token = flops_per_token(config).training
        self.tokens_per_step = config.train.global_batch_size * config.train.seq_length
        self._status_written = 0.0

    def _check_data(self, start: Start) -> Position:
        """The position at which the run begins, or that of its checkpoint; with the data that it goes on with."""
        data = self.data.opened.identity
        if start.checkpoint is None:
            return Position(0, 0, data)
        position = checkpoint.position(start.checkpoint)
        start.check_data(self.config, position.data, self.data.opened)
        if start.reads_anew(self.config):
            position = replace(position, consumed=0, data=data)
        return replace(position, tracking_id=None) if start.branches else position

    def _load(self, start: Start) -> None:
        """All of a checkpoint's state, and the data from its position on."""
        began = time.perf_counter()
        checkpoint.load(start.checkpoint, self.engine)
        self.data.seek(self.position.consumed)
        how = "Branching off from" if start.branches else "Going on from"
        self._tell(f"{how} {start.checkpoint} (loaded in {time.perf_counter() - began:.1f} s).")
        if start.branches:
            trunk = load_config(start.checkpoint / "config.yaml")
            if jump := rate_jump(trunk, self.config, self.position.step):
                self._tell(jump)
        if groups.is_main() and (other := checkpoint.other_code(start.checkpoint)):
            self._tell(other)

    def _build(self, start: Path | None) -> Engine:
        weights = None
        if start is None:
            read = f"Reading {self.config.train.init_from}"
            weights = groups.on_main(lambda: retry(lambda: initial_weights(self.config), read))
        dtype = DTYPES[self.config.train.dtype]
        for note in kernel_notes(self.config, groups.device(), dtype, training=True):
            self._tell(note)
        engine = Engine(self.config)
        if weights is not None:
            taken = checkpoint.init_from(weights, engine)
            self.say(f"Starting from the weights of {weights}.")
            for letter, regulator in engine.regulators.items():
                begins = "goes on as it was there" if letter in taken else "begins anew"
                self.say(f"What regulates {letter} ({regulator.name}) {begins}.")
        elif start is None:
            engine.initialize()
        return engine

    def _go_on_from_here(self, start: Start) -> None:
        """On the main process: the run's files become those of a run that stands at this step."""
        run, step = self.run, self.position.step
        if step and not start.branches:
            checkpoint_folder.make_current(run.checkpoints, checkpoint_folder.name(step))
        if start.goes_back:
            tracking.begin_anew(run.path)
            attempts.note_rollback(run, step)
        later = checkpoint_folder.later(run.checkpoints, step)
        if later:
            tracking.begin_anew(run.path)
            checkpoint_folder.abandon(run.checkpoints, later, self.config.checkpoint.keep)
            names, place = ", ".join(each.name for each in later), checkpoint_folder.ABANDONED
            self._tell(f"What was trained after step {step} is left behind; {names} moved to {place}/.")
        run.cut_metrics(0 if start.branches else step)
        save_config(self.config, run.config)

    def run_until_told(self) -> None:
        """The remaining steps, with validations and checkpoints on the way; ends early when asked to stop."""
        train, save, probe_every = self.config.train, self.config.checkpoint, self.config.evaluate.every
        self.write_status("running")
        began, first = time.perf_counter(), self.position.step
        for step in range(first + 1, train.steps + 1):
            result, metrics = self._step(step)
            last = step == train.steps
            self.watchdog.beat(step, "validating, probing or saving", long=True)
            if last or (train.validate_every and step % train.validate_every == 0):
                metrics |= self._validated()
            if self.probes is not None and (last or step % probe_every == 0):
                metrics |= self.probes.run(self.engine)
            if self.saver.pending and not result.saving:
                self.saver.go_on()
            milestone = step in save.milestones
            if last or result.stop or milestone or self.saver.failed or step % save.every == 0:
                metrics["checkpoint_seconds"] = self.saver.start(self.position)
            self._record(metrics)
            told = {"validation_loss", names.SECONDS} & metrics.keys()
            if step == first + 1 or step % train.log_every == 0 or told or result.skipped:
                left = (time.perf_counter() - began) / (step - first) * (train.steps - step)
                self.say(_line(metrics, result, self._regulated(), train.steps, left))
            if result.stop and not last:
                self.saver.insist(self.position)
                signals = {name for name in groups.gather(self.stop_request.signal) if name}
                reason = next(name for name in NAMES if name in signals)
                self.write_status("stopped", reason)
                self._tell(f"Stopped by {reason} after step {step}; {self._command_that_goes_on()} goes on.")
                return
            if milestone:  # a save that failed would be made up for with the state of another step
                self.saver.insist(self.position)
            self.watchdog.beat(step)
        self.watchdog.beat(train.steps, "saving", long=True)
        self.saver.insist(self.position)
        self.write_status("done")
        log.info("Done after step %d.", train.steps)

    def _validated(self) -> dict[str, float | None]:
        """The loss of held-out samples, and where they are of several sources, that of each one's."""
        ends = self.validation.ends if len(self.validation.ends) > 1 else {}
        loss, *each = self.engine.validate(self.validation, list(ends.values()))
        by_source = {f"validation_loss_{name}": nats for name, nats in zip(ends, each, strict=True)}
        return {"validation_loss": loss} | {key: nats for key, nats in by_source.items() if nats is not None}

    def _command_that_goes_on(self) -> str:
        back_to = self.config.train.resume_from
        again = back_to is not None and not attempts.has_gone_back(self.run, back_to)
        return "the same command without train.resume_from" if again else "the same command"

    def write_status(self, state: str, reason: str = "") -> None:
        """Write status.json on the main process; while the run goes on, if the disk takes it."""
        self._status_written = time.monotonic()
        if not groups.is_main():
            return

        def write() -> None:
            self.run.write_status(state, self.position.step, self.config.train.steps, reason)

        if state != "running":
            retry(write, f"Writing {self.run.status}")
        else:
            with contextlib.suppress(OSError):
                write()

    def _tell(self, text: str) -> None:
        log.info(text)
        self.say(text)

    def _step(self, step: int) -> tuple[StepResult, dict[str, Any]]:
        with self.tracing.step(step):
            started = time.perf_counter()
            batches = self.data.next_step()
            data_seconds = self.data.seconds
            stop = self.stop_request.signal is not None
            result = self.engine.step(batches, step, stop, self.saver.working, self._meanwhile)
            seconds = time.perf_counter() - started
        self.position = replace(
            self.position,
            step=step,
            consumed=self.data.consumed,
            tracking_id=self.tracker.id,
        )
        speed = self.tokens_per_step / seconds
        metrics: dict[str, Any] = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_second": speed,
            "data_seconds": data_seconds,
            "skipped": self.engine.guard.skipped,
            "repeated": int(result.repeated),
            **model_flops_utilization(self.flops_per_token, speed),
            **result.aux_losses,
        }
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:  # the host waits for these
            metrics |= memory(replayed=self.engine.graphs is not None)
            for regulator in self.engine.regulators.values():
                metrics |= {key: _short(values) for key, values in regulator.metrics().items()}
        return result, metrics

    def _meanwhile(self) -> None:
        """What the host has to do beside steps, while the device computes one."""
        self.tracker.send()
        if self.position.step + 1 < self.config.train.steps:
            self.data.prepare()

    def _regulated(self) -> list[str]:
        """What the terminal says of the regulated quantities."""
        return [
            filled(quantity.line, regulator.metrics()[quantity.key].tolist())
            for regulator in self.engine.regulators.values()
            for quantity in regulator.quantities(self.config)
            if quantity.line is not None
        ]

    def _record(self, metrics: dict[str, Any]) -> None:
        if groups.is_main():
            self.metrics.add(metrics)
            self.tracker.keep(metrics)
        if time.monotonic() - self._status_written > _SECONDS_BETWEEN_STATUS:
            self.write_status("running")


def _short(values: Tensor) -> list[list[float]]:
    """As a float32 that JSON writes with six digits: what .tolist() gives has seventeen."""
    return [[float(f"{value:.6g}") for value in row] for row in values.tolist()]


def _line(metrics: dict[str, Any], result: StepResult, regulated: list[str], steps: int, left: float) -> str:
    parts = [f"step {metrics['step']:>{len(str(steps))}}/{steps}", f"loss {metrics['loss']:.4f}"]
    if metrics.get("validation_loss") is not None:
        parts.append(f"validation {metrics['validation_loss']:.4f}")
    for key in metrics:
        if key.startswith(names.ACCURACY) and metrics[key][1] is not None:
            parts.append(f"{key.removeprefix(names.ACCURACY)} beyond the window {metrics[key][1]:.1%}")
    if result.skipped:
        parts.append(f"left out: {result.skipped}")
    speed = f"{metrics['tokens_per_second']:,.0f} tokens/s"
    return " · ".join([*parts, *regulated, speed, f"{duration(left)} left"])


def _nothing(text: str) -> None:
    pass
