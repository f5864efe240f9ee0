"""Checkpoints in canonical form: every parameter's fp32 weight and moments at full shape, whatever the layout.

    checkpoints/step_00000100/
        weights.safetensors, exp_avg.safetensors, exp_avg_sq.safetensors
        config.yaml, tokenizer.json
        checkpoint.json     step, samples consumed, controller, sizes and hashes of the files
    checkpoints/latest      the name of the newest complete one

A checkpoint is written under another name and renamed when it is durable, and `latest` moves after that, so a kill at
any moment leaves the last good one current.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from megahybrid.config import save_config
from megahybrid.errors import UserError
from megahybrid.files import sync_folder, write_json, write_text
from megahybrid.parallel import groups
from megahybrid.training.engine import MOMENTS, Engine


@dataclass(frozen=True)
class Position:
    """Where in training a checkpoint stands.

    Attributes:
        step: optimizer steps done.
        consumed: samples of the training data consumed.
        tracking_id: the W&B run's id.
    """

    step: int
    consumed: int
    tracking_id: str | None = None


def save(folder: Path, engine: Engine, position: Position, tokenizer: Path) -> None:
    """Write `folder/step_…`, move `latest` to it, and remove the oldest ones. Called by every process."""
    tensors = _gather(engine)
    if groups.is_main():
        name = f"step_{position.step:08d}"
        part = folder / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        files = {f"{kind}.safetensors": _write(part / f"{kind}.safetensors", each) for kind, each in tensors.items()}
        facts = {
            "step": position.step,
            "consumed": position.consumed,
            "tracking_id": position.tracking_id,
            "pattern": engine.settings.pattern.letters,
            "controller": {"layers": engine.lte_layers, **engine.controller.state()},
            "files": files,
        }
        save_config(engine.config, part / "config.yaml")
        shutil.copyfile(tokenizer, part / "tokenizer.json")
        write_json(part / "checkpoint.json", facts)
        sync_folder(part)
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(part, folder / name)
        sync_folder(folder)
        write_text(folder / "latest", name + "\n")
        _remove_old(folder, engine.config.checkpoint.keep)
    dist.barrier()


def find(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, a run directory's or a checkpoints folder's latest, or None."""
    for folder in (path, path / "checkpoints"):
        if (folder / "checkpoint.json").is_file():
            return folder
        if (folder / "latest").is_file():
            return folder / (folder / "latest").read_text().strip()
    return None


def load(path: Path, engine: Engine) -> Position:
    """Put a checkpoint's weights, moments and controller into the engine. Raises UserError if it does not fit."""
    facts = read_facts(path)
    engine.set_optimizer_steps(facts["step"])
    weights = read_tensors(path, "weights", facts)
    moments = {kind: read_tensors(path, kind, facts) for kind in MOMENTS}
    for name, parameter in engine.model.named_parameters():
        value = fitting(weights, name, parameter, path)
        safe_set_full_fp32_param(parameter, value)
        for kind in MOMENTS:
            safe_set_full_optimizer_state(parameter, fitting(moments[kind], name, parameter, path), kind)
        parameter.data.copy_(value)
    engine.controller.load_state(facts["controller"])
    return Position(facts["step"], facts["consumed"], facts["tracking_id"])


def read_facts(path: Path) -> dict[str, Any]:
    """A checkpoint's checkpoint.json. Raises UserError where there is none that can be read."""
    try:
        return json.loads((path / "checkpoint.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"'{path}' is not a readable checkpoint ({error}); name one that `train` wrote.") from error


def read_tensors(path: Path, kind: str, facts: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of `kind`.safetensors by parameter name. Raises UserError if the file is not what was saved."""
    file = path / f"{kind}.safetensors"
    if not file.is_file() or _facts_of(file) != facts["files"][file.name]:
        raise UserError(f"'{file}' is missing or not what was saved; go back to an older checkpoint.")
    return load_file(file)


def fitting(tensors: dict[str, Tensor], name: str, parameter: torch.nn.Parameter, path: Path) -> Tensor:
    """The named tensor, if its shape is the parameter's."""
    value = tensors.get(name)
    if value is None or value.shape != parameter.shape:
        found = "none" if value is None else f"{list(value.shape)}"
        raise UserError(
            f"'{path}' holds another model: {name} should be {list(parameter.shape)}, it has {found}; "
            "use the configuration it was trained with, or another run.dir."
        )
    return value.to(parameter.device)


def _gather(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Weights and moments by parameter name on the main process; a collective of all."""
    tensors: dict[str, dict[str, Tensor]] = {"weights": {}, **{kind: {} for kind in MOMENTS}}
    for name, parameter in engine.model.named_parameters():
        values = {"weights": safe_get_full_fp32_param(parameter)}
        values |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
        if groups.is_main():
            for kind, value in values.items():
                tensors[kind][name] = value.detach().cpu().contiguous()
    return tensors


def _write(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file(tensors, file)
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
    return _facts_of(file)


def _facts_of(file: Path) -> dict[str, Any]:
    with open(file, "rb") as handle:
        return {"bytes": file.stat().st_size, "blake2b": hashlib.file_digest(handle, "blake2b").hexdigest()}


def _remove_old(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob("step_*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
