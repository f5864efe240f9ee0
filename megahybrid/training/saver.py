"""Writing checkpoints beside training: it stops only while the state is copied to host memory.

Within a pipeline stage the tensor × data parallel ranks share its parameters: a parameter's parts are gathered, and one
rank copies the whole to its host memory. A thread of each rank then writes its file; when all have ended, which the
report of every step tells, the main process makes the checkpoint current. The threads take part in no collective.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megahybrid import code_version
from megahybrid.config import save_config
from megahybrid.errors import UserError
from megahybrid.files import sync_folder, write_json
from megahybrid.parallel import groups
from megahybrid.training import checkpoint_folder, zero
from megahybrid.training.checkpoint import Position, file_name
from megahybrid.training.engine import Engine
from megahybrid.training.ownership import Owner
from megahybrid.training.tensor_files import write_tensors


class Saver:
    """The checkpoints of one run, at most one of them in the making. All methods are called by every process."""

    def __init__(self, folder: Path, engine: Engine, tokenizer: Path, owner: Owner):
        self._folder, self._engine, self._tokenizer, self._owner = folder, engine, tokenizer, owner
        self._mine = owned_parameters(engine.model)
        self._host: dict[tuple[str, str], Tensor] = {}  # by kind and name, kept from save to save
        self._no_memory: str | None = None
        self._allocation = threading.Thread(target=self._allocate, daemon=True)
        self._allocation.start()
        self._name, self._part = "", Path()
        self._facts: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._files: dict[str, dict[str, Any]] = {}
        self._fault: str | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been started and not finished."""
        return self._thread is not None

    @property
    def writing(self) -> bool:
        """Whether this process is still writing its part of it."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, position: Position) -> float:
        """Begin a checkpoint; returns the seconds for which training was stopped. Raises as `finish`."""
        began = time.perf_counter()
        self.finish()
        self._await_memory()
        self._owner.check()
        self._name = checkpoint_folder.name(position.step)
        self._part = self._folder / f".{self._name}.{self._owner.token}.part"  # not where a start before still writes
        self._agree(self._make_room() if groups.is_main() else None)
        shares = self._snapshot()
        self._facts = self._facts_at(position)
        self._files, self._fault = {}, None
        self._thread = threading.Thread(target=self._write, args=(shares,), daemon=True)
        self._thread.start()
        return time.perf_counter() - began

    def finish(self) -> None:
        """Wait until the checkpoint in the making, if there is one, is durable, and make it current.

        Raises UserError, on every process, where the disk did not take it; the last checkpoint then stays current.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        written = groups.gather((self._files, self._fault))
        self._owner.check()
        fault = next((each for _, each in written if each), None)
        if groups.is_main() and fault is None:
            fault = self._seal([files for files, _ in written])
        self._agree(fault)

    def _make_room(self) -> str | None:
        """Remove what interrupted runs left, and make the folder; what went wrong, if anything did."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in [*self._folder.glob(".step_*.part"), *self._folder.glob(".step_*.old")]:
                shutil.rmtree(left, ignore_errors=True)
            self._part.mkdir()
        except OSError as fault:
            return fault.strerror or str(fault)
        return None

    def _agree(self, fault: str | None) -> None:
        """Raise UserError on all processes for a fault that the main one knows."""
        fault = groups.agree(fault)
        if fault is None:
            return
        if groups.is_main():
            shutil.rmtree(self._part, ignore_errors=True)
        raise UserError(
            f"The checkpoint {self._name} could not be written to '{self._folder}' ({fault}); "
            "make room and start again: training goes on from the checkpoint before."
        )

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
                local = zero.read(self._engine.deepspeed, parameter, kind).view(parameter.spec.local_shape(size))
                value = groups.gather_tensor_parallel(local, parameter.spec.axis)
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
            "controller": self._engine.controller.state(),
            "guard": self._engine.guard.state(),
        }

    def _write(self, shares: dict[str, dict[str, Tensor]]) -> None:
        """The thread: this process's files."""
        rank, _ = groups.world()
        try:
            for kind, tensors in shares.items():
                if tensors:
                    name = file_name(kind, rank)
                    facts = write_tensors(self._part / name, tensors)
                    shapes = {each: list(tensor.shape) for each, tensor in tensors.items()}
                    self._files[name] = {**facts, "shapes": shapes}
        except Exception as fault:  # a thread's own traceback would reach nobody
            self._fault = getattr(fault, "strerror", None) or f"{type(fault).__name__}: {fault}"

    def _seal(self, written: list[dict[str, dict[str, Any]]]) -> str | None:
        """Complete the folder and make it current, on the main process; what went wrong, if anything did."""
        facts, name = self._facts | {"parameters": {}, "files": {}}, self._name
        for number, files in enumerate(written):
            for file, each in files.items():
                for parameter, shape in each.pop("shapes").items():
                    facts["parameters"][parameter] = {"shape": shape, "file": number}
                facts["files"][file] = each
        try:
            save_config(self._engine.config, self._part / "config.yaml")
            shutil.copyfile(self._tokenizer, self._part / "tokenizer.json")
            write_json(self._part / "checkpoint.json", facts)
            sync_folder(self._part)
            shutil.rmtree(self._folder / name, ignore_errors=True)
            os.replace(self._part, self._folder / name)
            sync_folder(self._folder)
            checkpoint_folder.make_current(self._folder, name)
            checkpoint_folder.remove_old(self._folder, self._engine.config.checkpoint)
        except OSError as fault:
            return fault.strerror or str(fault)
        return None


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
    replica, replicas = groups.data_parallel()
    member = replica * tensor_size + tensor_rank
    return {name for name, owner in owners(model, tensor_size * replicas).items() if owner == member}


def owners(model: nn.Module, members: int) -> dict[str, int]:
    """Which of the ranks of a stage saves each parameter, so that all have about equally much to write."""
    load, owner = [0] * members, {}
    for name, parameter in sorted(saved_parameters(model), key=lambda each: (-each[1].spec.full_size, each[0])):
        owner[name] = load.index(min(load))
        load[owner[name]] += parameter.spec.full_size
    return owner
