"""The models of a study: every kind at every size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from megahybrid.config import Config, load_config
from megahybrid.config.arithmetic import fill
from megahybrid.config.pattern import parse_pattern
from megahybrid.data.lengths import sequence_lengths
from megahybrid.errors import UserError
from megahybrid.key import derived
from megahybrid.launch.profile import load_profile
from megahybrid.scaling.flops import Flops, flops_per_token
from megahybrid.study.file import KindConfig, SizeConfig, Study

if TYPE_CHECKING:
    from megahybrid.scaling.hours import Estimate

_OWN = (
    *("run.dir", "train.steps", "train.branch_from", "train.resume_from", "checkpoint.milestones"),
    *("optimizer.schedule", "optimizer.warmup_steps", "optimizer.decay_fraction"),
    *("tracking.name", "tracking.group"),
)
"""Keys that the study sets itself."""
_BY_RULE = {"optimizer.learning_rate": "learning_rate", "train.global_batch_size": "batch"}
"""Keys that a rule sets, unless it is `fixed`."""


_BYTES_A_PROCESS = 0.5 * 2**30
"""That CUDA takes beside what is allocated."""


class Counts(NamedTuple):
    """What is counted of a model, as in Model."""

    parameters: int
    parameters_without_embedding: int
    flops_per_token: float


@dataclass(frozen=True)
class Model:
    """A kind at a size.

    Attributes:
        kind, size: names; the size's is "WIDTHxLAYERS".
        config: the base recipe with all overrides.
        nodes, gpus: that a run has, GPUs over all nodes.
        parameters: all of them.
        parameters_without_embedding: without embedding and output layer.
        flops_per_token: of forward and backward pass.
    """

    kind: str
    size: str
    config: Config
    nodes: int
    gpus: int
    parameters: int
    parameters_without_embedding: int
    flops_per_token: float

    @property
    def replicas(self) -> int:
        """Data parallel size."""
        return self.gpus // self.config.parallel.replica


def size_name(size: SizeConfig) -> str:
    """How a size is called."""
    return f"{size.width}x{size.layers}"


def seconds_per_token(model: Model) -> float:
    """On one GPU, at the base recipe's batch."""
    train = model.config.train
    return tabled_estimate(model.config).step_seconds / (train.global_batch_size * train.seq_length)


def count_flops(config: Config) -> Flops:
    """Of a token of a recipe's own data, or, where these are not at hand, of samples that are one document each."""
    return flops_per_token(config, sequence_lengths(config))


def tabled_estimate(config: Config) -> Estimate:
    """Of a recipe's GPU hours, from these FLOPs and a table."""
    from megahybrid.scaling.hours import tabled  # loads torch and Megatron, as what counts parameters does

    return tabled(config, lengths=sequence_lengths(config))


def side_by_side(memories: Iterable[float]) -> list[float]:
    """Bytes that the largest run, the two largest, … take at once on one GPU, of runs that take so many each."""
    return list(itertools.accumulate(sorted((each + _BYTES_A_PROCESS for each in memories), reverse=True)))


def make_models(
    study: Study, size: SizeConfig, known: Mapping[tuple[str, str], Counts] = MappingProxyType({})
) -> dict[str, Model]:
    """The models of a size by kind; with `match: parameters` all have as many as the first. Raises UserError.

    Args:
        study, size: what they are made of.
        known: by kind and size, what need not be counted again.
    """
    models: dict[str, Model] = {}
    for name, kind in study.kinds.items():
        where = f"{name}-{size_name(size)}"
        try:
            config = load_config(study.base, _overrides(study, kind, size))
            model = _model(study, name, size, config, known.get((name, size_name(size))))
            if models and study.match == "parameters":
                model = _with_parameters(study, size, model, next(iter(models.values())).parameters)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        models[name] = model
    return models


def _overrides(study: Study, kind: KindConfig, size: SizeConfig) -> list[str]:
    """key=value, later ones on top."""
    names = {"width": size.width, "layers": size.layers}
    layers: list[Mapping[str, Any]] = [{"model.pattern": kind.pattern, "model.hidden_size": size.width}]
    layers += [study.overrides, size.overrides, kind.overrides]
    overrides = {}
    for layer in layers:
        for key, value in layer.items():
            if key in _OWN:
                raise UserError(f"overrides has {key}, which the study sets itself; remove it.")
            if (rule := _BY_RULE.get(key)) and getattr(study.rules, rule) != "fixed":
                raise UserError(f"overrides has {key}, which rules.{rule} sets; remove it, or make the rule fixed.")
            overrides[key] = fill(value, **names) if isinstance(value, str) else json.dumps(value)
    return [f"{key}={value}" for key, value in overrides.items()]


def _model(study: Study, kind: str, size: SizeConfig, config: Config, counts: Counts | None = None) -> Model:
    profile = study.limits.profile
    gpus = size.nodes * (load_profile(profile).gpus_per_node if profile else 1)
    parallel = config.parallel
    if gpus % parallel.replica:
        raise UserError(
            f"{gpus} GPUs are no multiple of parallel.tensor * parallel.context * parallel.pipeline "
            f"({parallel.tensor} * {parallel.context} * {parallel.pipeline}); change nodes, or one of them."
        )
    return Model(
        kind=kind,
        size=size_name(size),
        config=config,
        nodes=size.nodes,
        gpus=gpus,
        **(counts or _count(config))._asdict(),
    )


def _count(config: Config) -> Counts:
    from megahybrid.scaling.plan import parameters_by_part

    parts = parameters_by_part(config)
    total = sum(parts.values())
    return Counts(total, total - parts["embedding"] - parts["output layer"], count_flops(config).training)


def _with_parameters(study: Study, size: SizeConfig, model: Model, parameters: int) -> Model:
    """The model with as many parameters as another one, within 1 %, by the width of its SwiGLU in steps of 8."""
    settings = derived(model.config.model)
    column = 3 * settings.hidden_size * len(parse_pattern(settings.pattern).letters)
    width = settings.intermediate_size + 8 * round((parameters - model.parameters) / (8 * column))
    changed = replace(model.config, model=replace(model.config.model, intermediate_size=max(8, width)))
    model = _model(study, model.kind, size, changed)
    if abs(model.parameters / parameters - 1) > 0.01:
        raise UserError(
            f"it has {model.parameters:,} parameters where the first kind has {parameters:,}, which no width of the "
            "SwiGLU makes up for; change its overrides, or match flops."
        )
    return model
