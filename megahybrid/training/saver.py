"""Writing checkpoints beside training: it stops only while the state is copied to host memory.

All ranks of a pipeline stage share its parameters: a parameter's parts are gathered, and one rank copies the whole to
its host memory. A thread of each rank then writes its file; when all have ended, which the report of every step tells,
one of the main process makes the checkpoint current, and another removes old ones. The threads take part in no
collective.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megahybrid import code_version
from megahybrid.config import save_config
from megahybrid.errors import MachineFault, UserError
from megahybrid.files import sync_folder, write_json
from megahybrid.parallel import groups
from megahybrid.retry import Patience, is_of_a_disk, retry
from megahybrid.training import checkpoint_folder, zero
from megahybrid.training.checkpoint import Position, file_name
from megahybrid.training.engine import Engine
from megahybrid.training.ownership import Owner
from megahybrid.training.tensor_files import write_tensors

_SECONDS_AT_ONCE = 20.0  # for which a part of a checkpoint is tried again before the save has failed
_SECONDS_BETWEEN_LAST_TRIES = 1.0


class Saver:
    """The checkpoints of one run, at most one of them in the making. All methods are called by every process.

    A save that a disk does not take is logged, and is due again at once, with the state of then; the last checkpoint
    stays current. Once that has lasted too long, all processes raise: MachineFault, or UserError for a full disk.

    Attributes:
        failed: whether the last save has failed, the same on every process.
    """

    def __init__(self, folder: Path, engine: Engine, tokenizer: str, owner: Owner, before_sealing: Callable[[], None]):
        """`tokenizer` is the text of its file. `before_sealing` is called by the main process before a checkpoint
        becomes current, which it does not do while that raises OSError.
        """
        self._folder, self._engine, self._tokenizer, self._owner = folder, engine, tokenizer, owner
        self._before_sealing = before_sealing
        self.failed = False
        self._patience = Patience()
        self._mine = owned_parameters(engine.model)
        self._host: dict[tuple[str, str], Tensor] = {}  # by kind and name, kept from save to save
        self._no_memory: str | None = None
        self._allocation = threading.Thread(target=self._allocate, daemon=True)
        self._allocation.start()
        self._name, self._part = "", Path()
        self._facts: dict[str, Any] = {}
        self._thread: threading.Thread | None = None  # at work on the checkpoint in the making
        self._next: Callable[[], None] | None = None  # what follows for it when no process is
        self._removal: threading.Thread | None = None  # of checkpoints before the current one
        self._files: dict[str, dict[str, Any]] = {}
        self._fault: OSError | UserError | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been started and not finished."""
        return self._next is not None

    @property
    def working(self) -> bool:
        """Whether this process is still at work on its part of it."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, position: Position) -> float:
        """Begin a checkpoint; returns the seconds for which training was stopped."""
        began = time.perf_counter()
        self.finish()
        self._await_memory()
        self._name = checkpoint_folder.name(position.step)
        self._part = self._folder / f".{self._name}.{self._owner.token}.part"  # not where a start before still writes
        if self._fails(self._make_room() if groups.is_main() else None):
            return time.perf_counter() - began
        shares = self._snapshot()
        self._facts = self._facts_at(position)
        self._files, self._fault = {}, None
        self._beside_training(lambda: self._write(shares))
        self._next = self._begin_sealing
        return time.perf_counter() - began

    def go_on(self) -> None:
        """What follows for the checkpoint in the making: where all is written, that it becomes current beside training;
        where that is done, that it is finished. Waits where this process is at work on it."""
        self._thread.join()
        following, self._next = self._next, None
        following()

    def finish(self) -> None:
        """Wait until the checkpoint in the making, if there is one, is durable and current."""
        while self.pending:
            self.go_on()

    def _beside_training(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as fault:  # a thread's own traceback would reach nobody
                sentence = f"A checkpoint could not be written to '{self._folder}': {type(fault).__name__}: {fault}."
                self._fault = UserError(sentence)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _begin_sealing(self) -> None:
        written = groups.gather((self._files, self._fault))
        self._fault, self._next = next((each for _, each in written if each), None), self._conclude
        if groups.is_main() and self._fault is None:
            self._fault = self._attempt(self._before_sealing)
        if groups.is_main() and self._fault is None:
            facts = self._completed_facts([files for files, _ in written])
            self._beside_training(lambda: self._seal(facts))

    def _conclude(self) -> None:
        if not self._fails(self._fault):
            self._patience.relax()

    def insist(self, position: Position) -> None:
        """Return once the state, which stands at `position`, is saved: after a save that failed it is tried again."""
        self.finish()
        while self.failed:
            time.sleep(_SECONDS_BETWEEN_LAST_TRIES)
            self.start(position)
            self.finish()
        self._await_removal()

    def _await_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()

    def _make_room(self) -> OSError | UserError | None:
        """Make the folder; what went wrong, if anything did."""
        try:
            self._owner.check_here()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._part.mkdir(exist_ok=True)
        except (OSError, UserError) as fault:
            return fault
        return None

    def _remove_left(self) -> None:
        """What interrupted runs, or saves that failed, have left."""
        self._await_removal()
        with contextlib.suppress(OSError):  # a later save lists them again
            for left in [*self._folder.glob(".step_*.part"), *self._folder.glob(".step_*.old")]:
                if left != self._part:
                    shutil.rmtree(left, ignore_errors=True)

    def _attempt(self, action: Callable[[], Any]) -> OSError | UserError | None:
        """Do what writes a part of the checkpoint, with a few tries; why it failed, if it did."""
        try:
            retry(action, f"Writing {self._part}", is_of_a_disk, _SECONDS_AT_ONCE)
        except MachineFault as error:
            return error.__cause__
        except UserError as error:
            return error
        return None

    def _fails(self, fault: OSError | UserError | None) -> bool:
        """Whether the main process knows a fault of this save. Raises it where saves have failed for too long."""
        end = None
        if groups.is_main() and fault is not None:
            shutil.rmtree(self._part, ignore_errors=True)
            what = f"The checkpoint {self._name} in '{self._folder}'"
            try:
                if isinstance(fault, UserError):
                    raise fault
                self._patience.bear(what, fault)
            except UserError as error:
                end = error
        self.failed, end = groups.broadcast((fault is not None, end))
        if end is not None:
            raise end
        return self.failed

    def _allocate(self) -> None:
        """Get the host memory of all saves, beside the first steps: pinning it takes seconds for some GB."""
        try:
            for name, parameter in saved_parameters(self._engine.model):
                for kind in zero.KINDS if name in self._mine else ():
                    self._host[kind, name] = _host_tensor(parameter.spec.shape)
        except RuntimeError as fault:
            self._no_memory = str(fault).splitlines()[0]

    def _await_memory(self) -> None:
        """Raise UserError, on every process, where one of them did not get its host memory."""
        self._allocation.join()
        fault = next((each for each in groups.gather(self._no_memory) if each), None)
        if fault:
            needed = 4 * sum(each.spec.full_size for _, each in saved_parameters(self._engine.model)) * len(zero.KINDS)
            raise UserError(
                f"There is no host memory for a checkpoint ({fault}); the ranks of this pipeline stage need "
                f"{needed / 2**30:.1f} GiB together: ask for more memory a node, or spread the model over more nodes."
            )

    def _snapshot(self) -> dict[str, dict[str, Tensor]]:
        """This process's share of its stage's state in host memory, by kind and parameter name."""
        shares: dict[str, dict[str, Tensor]] = {kind: {} for kind in zero.KINDS}
        _, size = groups.tensor_parallel()
        for name, parameter in saved_parameters(self._engine.model):
            for kind in zero.KINDS:
                local = self._engine.zero.read(parameter, kind).view(parameter.spec.local_shape(size))
                value = groups.gather_tensor_parallel(local, parameter.spec.axis, parameter.spec.copies(size))
                if name in self._mine:
                    shares[kind][name] = self._host[kind, name].copy_(value.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return shares

    def _facts_at(self, position: Position) -> dict[str, Any]:
        _, replicas = groups.data_parallel()
        return {
            "megahybrid": code_version(),
            "position": asdict(position),
            "layers": self._engine.settings.pattern.letters,
            "layout": {**asdict(self._engine.config.parallel), "data": replicas},
            "regulators": {letter: each.state() for letter, each in self._engine.regulators.items()},
            "guard": self._engine.guard.state(),
        }

    def _write(self, shares: dict[str, dict[str, Tensor]]) -> None:
        """This process's files."""
        rank, _ = groups.world()
        if groups.is_main():
            self._remove_left()
        for kind, tensors in shares.items():
            if tensors and self._fault is None:
                name = file_name(kind, rank)
                self._fault = self._attempt(lambda name=name, tensors=tensors: self._write_file(name, tensors))

    def _write_file(self, name: str, tensors: dict[str, Tensor]) -> None:
        facts = write_tensors(self._part / name, tensors)
        self._files[name] = {**facts, "shapes": {each: list(tensor.shape) for each, tensor in tensors.items()}}

    def _completed_facts(self, written: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
        """The checkpoint's checkpoint.json, with what every process has written."""
        facts = self._facts | {"parameters": {}, "files": {}}
        for number, files in enumerate(written):
            for file, each in files.items():
                for parameter, shape in each.pop("shapes").items():
                    facts["parameters"][parameter] = {"shape": shape, "file": number}
                facts["files"][file] = each
        return facts

    def _seal(self, facts: dict[str, Any]) -> None:
        """Complete the folder, make it current and begin to remove old ones, on the main process."""
        self._fault = self._attempt(lambda: self._make_current(facts))
        if self._fault is None:
            self._removal = threading.Thread(target=self._remove_old)  # a hundred GB take a file system seconds
            self._removal.start()

    def _make_current(self, facts: dict[str, Any]) -> None:
        """Goes on where a try before it has failed."""
        name = self._name
        self._owner.check_here()
        if self._part.exists():
            save_config(self._engine.config, self._part / "config.yaml")
            (self._part / checkpoint_folder.TOKENIZER).write_text(self._tokenizer, encoding="utf-8")
            write_json(self._part / "checkpoint.json", facts)
            sync_folder(self._part)
            shutil.rmtree(self._folder / name, ignore_errors=True)
            os.replace(self._part, self._folder / name)
        sync_folder(self._folder)
        if not (self._folder / name / "checkpoint.json").is_file():
            raise FileNotFoundError(errno.ENOENT, "what was written of it is gone")
        checkpoint_folder.make_current(self._folder, name)

    def _remove_old(self) -> None:
        with contextlib.suppress(OSError):  # what is too much today is removed next time
            checkpoint_folder.remove_old(self._folder, self._engine.config.checkpoint)


def _host_tensor(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, pin_memory=torch.cuda.is_available())


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What this pipeline stage saves, by name: not the last stage's copy of a tied embedding."""
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "ds_pipe_replicated", False):
            yield name, parameter


def owned_parameters(model: nn.Module) -> set[str]:
    """Names of what this process saves of its stage."""
    tensor_rank, tensor_size = groups.tensor_parallel()
    holder, holders = groups.weight_holders()
    member = holder * tensor_size + tensor_rank
    return {name for name, owner in owners(model, tensor_size * holders).items() if owner == member}


def owners(model: nn.Module, members: int) -> dict[str, int]:
    """Which of the ranks of a stage saves each parameter, so that all have about equally much to write."""
    load, owner = [0] * members, {}
    for name, parameter in sorted(saved_parameters(model), key=lambda each: (-each[1].spec.full_size, each[0])):
        owner[name] = load.index(min(load))
        load[owner[name]] += parameter.spec.full_size
    return owner
