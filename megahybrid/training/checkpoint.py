"""Checkpoints in canonical form: every parameter's fp32 weight and moments at full shape, whatever the layout.

    checkpoints/step_00000100/
        weights.safetensors, exp_avg.safetensors, exp_avg_sq.safetensors
        config.yaml, tokenizer.json
        checkpoint.json     position, controller, guard, sizes and hashes of the files
    checkpoints/latest      the name of the newest complete one

A checkpoint is written under another name and renamed when it is durable, and `latest` moves after that, so a kill at
any moment leaves the last good one current. There is no random state to keep: data order and dropout are counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megahybrid import code_version
from megahybrid.config import save_config
from megahybrid.config.schema import CheckpointConfig
from megahybrid.errors import UserError
from megahybrid.files import sync_folder, write_json, write_text
from megahybrid.parallel import groups
from megahybrid.training import zero
from megahybrid.training.engine import Engine


@dataclass(frozen=True)
class Position:
    """Where in training a checkpoint stands.

    Attributes:
        step: optimizer steps done.
        consumed: samples of the training data consumed.
        data: identity of the prepared data.
        tracking_id: the W&B run's id.
    """

    step: int
    consumed: int
    data: str
    tracking_id: str | None = None


def save(folder: Path, engine: Engine, position: Position, tokenizer: Path) -> None:
    """Write `folder/step_…`, move `latest` to it, and remove what need not be kept. Called by every process.

    Raises UserError, on every process, where the disk does not take it; the last checkpoint then stays current.
    """
    tensors = _gather(engine)
    error = None
    if groups.is_main():
        name = f"step_{position.step:08d}"
        part = folder / f".{name}.part"
        try:
            _write(part, engine, position, tokenizer, tensors)
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(part, folder / name)
            sync_folder(folder)
            write_text(folder / "latest", name + "\n")
            _remove_old(folder, engine.config.checkpoint)
        except OSError as fault:
            shutil.rmtree(part, ignore_errors=True)
            error = (
                f"The checkpoint of step {position.step} could not be written to '{folder}' ({fault.strerror or fault})"
            )
    error = groups.agree(error)
    if error is not None:
        raise UserError(f"{error}; make room and start again: training goes on from the checkpoint before.")


def find(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, a run directory's or a checkpoints folder's latest, or None.

    Raises UserError where `latest` names one that is not there.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / "checkpoint.json").is_file():
            return folder
        if (folder / "latest").is_file():
            found = folder / (folder / "latest").read_text().strip()
            if not (found / "checkpoint.json").is_file():
                raise UserError(f"'{found}' is not whole; {_older(found)}.")
            return found
    return None


def load(path: Path, engine: Engine) -> Position:
    """Put a checkpoint's weights, moments, controller and guard into the engine. Raises UserError if it is damaged."""
    facts = read_facts(path)
    zero.reset_optimizer_state(engine.deepspeed, facts["position"]["step"])
    for kind in zero.KINDS:
        tensors = read_tensors(path, kind, facts)
        for name, parameter in engine.model.named_parameters():
            value = fitting(tensors, name, parameter, path).to(engine.device)
            zero.write(engine.deepspeed, parameter, kind, value)
    engine.controller.load_state(facts["controller"])
    engine.guard.load_state(facts["guard"])
    return Position(**facts["position"])


def load_weights(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model that no optimizer owns yet. Raises UserError if they do not fit."""
    weights = read_tensors(path, zero.WEIGHTS, read_facts(path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fitting(weights, name, parameter, path))


def read_facts(path: Path) -> dict[str, Any]:
    """A checkpoint's checkpoint.json. Raises UserError where there is none that can be read."""
    try:
        return json.loads((path / "checkpoint.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not a readable checkpoint; {_older(path)}.") from error


def read_tensors(path: Path, kind: str, facts: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of `kind`.safetensors by parameter name. Raises UserError if the file is not what was saved."""
    file = path / f"{kind}.safetensors"
    if not file.is_file() or _facts_of(file) != facts["files"][file.name]:
        raise UserError(f"'{file}' is missing or not what was saved; {_older(path)}.")
    return load_file(file)


def fitting(tensors: dict[str, Tensor], name: str, parameter: nn.Parameter, path: Path) -> Tensor:
    """The named tensor, if its shape is the parameter's."""
    value, shape = tensors.get(name), parameter.spec.shape
    if value is None or tuple(value.shape) != shape:
        found = "none" if value is None else f"{list(value.shape)}"
        raise UserError(
            f"'{path}' holds another model: {name} should be {list(shape)}, it has {found}; "
            "use the configuration it was trained with."
        )
    return value


def _older(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    whole = [
        each for each in sorted(path.parent.glob("step_*")) if each != path and (each / "checkpoint.json").is_file()
    ]
    if whole:
        return f"write {whole[-1].name} into '{path.parent / 'latest'}' to go on from there"
    return "there is no other one beside it: start again in another run.dir"


def _gather(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Weights and moments by kind and parameter name on the main process; a collective of all."""
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in zero.KINDS}
    for name, parameter in engine.model.named_parameters():
        for kind in zero.KINDS:
            value = zero.read(engine.deepspeed, parameter, kind)
            if groups.is_main():
                tensors[kind][name] = value.detach().cpu().view(parameter.spec.shape).contiguous()
    return tensors


def _write(
    part: Path, engine: Engine, position: Position, tokenizer: Path, tensors: dict[str, dict[str, Tensor]]
) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = {}
    for kind, each in tensors.items():
        file = part / f"{kind}.safetensors"
        try:
            save_file(each, file)
        except OSError:
            raise
        except Exception as error:  # safetensors reports a full disk as an error of its own
            raise OSError(str(error)) from error
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
        files[file.name] = _facts_of(file)
    save_config(engine.config, part / "config.yaml")
    shutil.copyfile(tokenizer, part / "tokenizer.json")
    facts = {
        "megahybrid": code_version(),
        "position": asdict(position),
        "layers": engine.settings.pattern.letters,
        "controller": engine.controller.state(),
        "guard": engine.guard.state(),
        "files": files,
    }
    write_json(part / "checkpoint.json", facts)
    sync_folder(part)


def _facts_of(file: Path) -> dict[str, Any]:
    with open(file, "rb") as handle:
        return {"bytes": file.stat().st_size, "blake2b": hashlib.file_digest(handle, "blake2b").hexdigest()}


def _remove_old(folder: Path, config: CheckpointConfig) -> None:
    passing = [
        each
        for each in sorted(folder.glob("step_*"))
        if not config.milestone_every or int(each.name.removeprefix("step_")) % config.milestone_every
    ]
    for old in passing[: -config.keep]:
        trash = folder / f".{old.name}.old"
        with contextlib.suppress(FileNotFoundError):
            os.replace(old, trash)  # never half a checkpoint under its own name
        shutil.rmtree(trash, ignore_errors=True)
