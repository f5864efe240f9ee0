"""Checkpoints in canonical form: every parameter's fp32 weight and moments at full shape, whatever the layout.

    checkpoints/step_00000100/
        weights-00000.safetensors, exp_avg-00000.safetensors, exp_avg_sq-00000.safetensors,
        weights-00001.safetensors, …            the parameters, each in one of the numbered files
        config.yaml, tokenizer.json
        checkpoint.json     position, regulators, guard, layout, each parameter's shape and file, the files' hashes

Written by saver.py under another name and renamed when it is durable; checkpoint_folder.py says which one is current. A
kill at any moment leaves the last good one so. There is no random state to keep: data order and dropout are counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megahybrid import code_version
from megahybrid.errors import UserError
from megahybrid.parallel import groups
from megahybrid.parallel.parameters import ParameterSpec, Place, whole
from megahybrid.retry import retry
from megahybrid.training import zero
from megahybrid.training.checkpoint_folder import others
from megahybrid.training.engine import Engine
from megahybrid.training.tensor_files import facts_of, read_part


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


def file_name(kind: str, number: int) -> str:
    """The file of weights or moments that process `number` wrote."""
    return f"{kind}-{number:05d}.safetensors"


def load(path: Path, engine: Engine) -> None:
    """Put a checkpoint's weights, moments, regulators' states and guard into the engine. Called by every process.

    Raises UserError, on every process, if it is damaged, of another model, or without a regulator's state.
    """
    facts = read_state(path)
    _verify(path, facts, engine.model, zero.KINDS)
    if missing := engine.regulators.keys() - facts["regulators"].keys():
        raise UserError(
            f"'{path}' knows nothing of what the mixer '{min(missing)}' regulates by now; "
            f"start a new run with train.init_from='{path}'."
        )
    engine.guard.load_state(facts["guard"])
    accepted = facts["position"]["step"] - engine.guard.skipped  # what AdamW counts
    engine.zero.reset_state(accepted)
    for name, parameter in engine.model.named_parameters():
        for kind in zero.KINDS:
            _read(path, facts, kind, name, parameter, *engine.zero.place(parameter, kind))
    engine.zero.round_masters()
    for letter, regulator in engine.regulators.items():
        regulator.load_state(facts["regulators"][letter])


def position(path: Path) -> Position:
    """Where a checkpoint stands. Raises UserError as `read_state`."""
    return Position(**read_state(path)["position"])


def other_code(path: Path) -> str | None:
    """A sentence where another version of the code wrote a checkpoint; None where this one did."""
    wrote, ours = read_facts(path)["megahybrid"], code_version()
    return None if wrote == ours else f"{path} was written by megahybrid {wrote}, this is {ours}."


def load_weights(path: Path, model: nn.Module, place: Place = whole) -> None:
    """Give a model a checkpoint's weights, and nothing else. Called by every process; raises as `load`."""
    facts = read_facts(path)
    _verify(path, facts, model, [zero.WEIGHTS])
    for name, parameter in model.named_parameters():
        _read(path, facts, zero.WEIGHTS, name, parameter, *place(parameter))


def init_from(path: Path, engine: Engine) -> list[str]:
    """Give an engine a checkpoint's weights, and the states of those regulators that have as many layers and members
    there, whose letters it returns; others begin as ever. Called by every process; raises as `load`."""
    load_weights(path, engine.model, engine.zero.place)
    engine.zero.round_masters()
    states, taken = read_facts(path).get("regulators", {}), []
    for letter, regulator in engine.regulators.items():
        if letter in states and _fits(states[letter], regulator.state()):
            regulator.load_state(states[letter])
            taken.append(letter)
    return taken


def _fits(state: Mapping[str, list], own: Mapping[str, list]) -> bool:
    """Whether a state has the shapes of a regulator's own."""
    there, here = ({name: torch.tensor(values).shape for name, values in each.items()} for each in (state, own))
    return there == here


def read_facts(path: Path) -> dict[str, Any]:
    """A checkpoint's checkpoint.json. Raises UserError where there is none that can be read."""
    try:
        return json.loads(retry((path / "checkpoint.json").read_text, f"Reading '{path}'"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not a readable checkpoint; {others(path)}.") from error


def read_state(path: Path) -> dict[str, Any]:
    """As `read_facts`, of a checkpoint from which a run can go on. Raises UserError for one of weights only."""
    facts = read_facts(path)
    if "regulators" not in facts:
        raise UserError(f"'{path}' holds weights only; start a new run with train.init_from='{path}'.")
    return facts


def weights_name(facts: dict[str, Any]) -> str:
    """Names the values of a checkpoint's parameters, by its checkpoint.json."""
    files = {name: file for name, file in facts["files"].items() if name.startswith("weights-")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def _verify(path: Path, facts: dict[str, Any], model: nn.Module, kinds: Sequence[str]) -> None:
    """Raise UserError, on all processes, unless the model fits and the files of `kinds` are what was saved."""
    specs = {name: parameter.spec for name, parameter in model.named_parameters()}
    error = other_model(path, facts, specs) or _damage(path, facts, kinds)
    errors = [each for each in groups.gather(error) if each]
    if errors:
        raise UserError(errors[0])


def other_model(path: Path, facts: dict[str, Any], specs: Mapping[str, ParameterSpec]) -> str | None:
    """Why a checkpoint does not hold the values of these parameters, given by name, or None."""
    for name, spec in specs.items():
        shape, found = list(spec.shape), facts["parameters"].get(name, {}).get("shape")
        if shape != found:
            return (
                f"'{path}' holds another model: {name} should be {shape}, it has {found or 'none'}; "
                "use the configuration it was trained with."
            )
    return None


def _damage(path: Path, facts: dict[str, Any], kinds: Sequence[str]) -> str | None:
    """Compare this process's share of the files with their hashes."""
    rank, world = groups.world()
    names = [name for name in sorted(facts["files"]) if name.rpartition("-")[0] in kinds]

    def is_whole(name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return retry(lambda: facts_of(path / name), f"Reading '{path / name}'") == facts["files"][name]
        return False

    mine = names[rank::world]
    with ThreadPoolExecutor() as pool:
        for name, whole in zip(mine, pool.map(is_whole, mine), strict=True):
            if not whole:
                return _damaged(path / name)
    return None


def lost_file(path: Path, facts: dict[str, Any]) -> str | None:
    """Name a file that is not there, or not as long as what was saved, or None; hashes are compared when it is read."""
    for name, each in facts["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != each["bytes"]:
            return _damaged(path / name)
    return None


def _damaged(file: Path) -> str:
    return f"'{file}' is missing or not what was saved; {others(file.parent)}."


def _read(
    path: Path, facts: dict[str, Any], kind: str, name: str, parameter: nn.Parameter, begin: int, held: Tensor
) -> None:
    """Fill what a `Place` says with its elements of a weight or moment."""
    if len(held):
        file, elements = path / file_name(kind, facts["parameters"][name]["file"]), range(begin, begin + len(held))
        part = (parameter.spec, *groups.tensor_parallel())
        held.copy_(retry(lambda: read_part(file, name, *part, elements), f"Reading '{file}'"))
