"""The study file: every key of it, its default, its meaning and its range; a number is above 0 where nothing else is
said."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from megahybrid.config.load import merge, read_tree
from megahybrid.errors import UserError
from megahybrid.key import key, keys
from megahybrid.study.rules import BATCHES, LEARNING_RATES

STUDIES = Path("studies")
"""Where every study has a folder of its name."""
UNITS = "flops", "tokens_per_parameter", "tokens"
"""Of budgets."""


@dataclass
class KindConfig:
    """A kind of model; the pattern alone may stand for all of it."""

    pattern: str = key()
    """model.pattern, in which {…} is computed from `layers` and `width`, as in (GL)*{layers/2}."""
    overrides: dict[str, Any] = key({})
    """Keys of the recipe for all its models, such as {model.attention.num_heads: "{width/64}"}, on top of a size's."""


class _Budgets:
    """What gives budgets in one of several units, each a field."""

    @property
    def units(self) -> list[str]:
        """Those that are given: one, once the file is checked."""
        return [unit for unit in UNITS if getattr(self, unit)]


@dataclass
class BudgetsConfig(_Budgets):
    """How long the runs are: one of the three."""

    flops: list[float] = key([])
    """Training FLOPs that every size is given."""
    tokens_per_parameter: list[float] = key([])
    """Tokens for every parameter, embeddings included, that every size of the first kind is given."""
    tokens: list[float] = key([])
    """Tokens that every size of the first kind is given."""

    @property
    def values(self) -> list[float]:
        """The budgets, ascending."""
        return sorted(itertools.chain.from_iterable(getattr(self, unit) for unit in self.units))


@dataclass
class SizeConfig:
    """A size that every kind has."""

    width: int = key()
    """model.hidden_size."""
    layers: int = key()
    """Layers that patterns are filled with."""
    overrides: dict[str, Any] = key({})
    """Keys of the recipe for all models of this size, on top of the study's."""
    nodes: int = key(1)
    """Nodes that a run of this size has, of limits.profile."""
    budgets: BudgetsConfig | None = key(None)
    """Its own, in place of the study's."""


@dataclass
class ScheduleConfig:
    """The learning rate's way."""

    kind: str = key("wsd_branches", choices=("wsd_branches", "cosine"))
    """wsd_branches: the longest run of a kind and size is a trunk, from which the shorter ones branch off; cosine:
    every run is one from scratch."""
    decay: float = key(0.2, below=1)
    """wsd_branches: part of a run in which the rate falls."""
    warmup_tokens: float | None = key(None)
    """Tokens of linear warm-up; one a parameter when left out (Porian et al., arXiv 2406.19146)."""


@dataclass
class TuneConfig:
    """A grid of learning rates that is trained first: the best factor multiplies the rates of all other runs of its
    kind."""

    at: str = key("smallest", choices=("smallest",))
    """The size that is tuned, at the smallest budget."""
    factors: list[float] = key([0.35, 0.5, 0.7, 1.0, 1.4])
    """Factors on what the rule says of these runs."""


@dataclass
class RulesConfig:
    """What sets learning rate and batch of every run; megahybrid/study/rules.py has the rules and their sources."""

    learning_rate: str = key("step_law", choices=tuple(LEARNING_RATES))
    """step_law, olmo_core, or fixed: the base recipe's."""
    batch: str = key("step_law", choices=tuple(BATCHES))
    """Likewise."""
    tune: TuneConfig | None = key(None)
    """Nothing is tuned when left out."""


@dataclass
class RepeatsConfig:
    """Runs that differ in their seed alone."""

    seeds: int = key(1)
    """Runs of each; the first has the base recipe's train.seed, each other one more."""
    at: str = key("smallest", choices=("smallest", "all"))
    """Which sizes are repeated."""


@dataclass
class HoldOutConfig(_Budgets):
    """A run of every kind that no fit sees and that is run last; `largest` alone may stand for all of it."""

    at: str | None = key(None, choices=("largest",))
    """largest: each kind's largest size at the largest of its budgets."""
    width: int | None = key(None)
    """Or a size of its own, as in `sizes`,"""
    layers: int | None = key(None)
    """with as many layers,"""
    overrides: dict[str, Any] = key({})
    """overrides"""
    nodes: int = key(1)
    """and nodes,"""
    flops: float | None = key(None)
    """at a budget of its own, as in `budgets`:"""
    tokens_per_parameter: float | None = key(None)
    """or in this unit,"""
    tokens: float | None = key(None)
    """or in this."""


@dataclass
class TargetConfig:
    """A model whose loss is to be predicted."""

    parameters: float = key()
    """Embeddings included."""
    tokens: float = key()
    """That it is trained on."""


@dataclass
class LimitsConfig:
    """What a study may take, and where it runs."""

    gpu_hours: float | None = key(None)
    """Of all runs together; no limit when left out."""
    profile: str | None = key(None)
    """A file, or a name in slurm/profiles, of the cluster; one GPU of this machine a run when left out."""


@dataclass
class Study:
    """A complete study file."""

    study: str = key()
    """Its name: of its folder in studies/ and of its W&B group."""
    base: str = key()
    """The recipe from which all keys come that the study does not set; relative to the working directory."""
    kinds: dict[str, KindConfig] = field(default_factory=dict)
    """Kinds of models by name; the first is the one that others are compared with."""
    sizes: list[SizeConfig] = key([])
    """Of each kind."""
    overrides: dict[str, Any] = key({})
    """Keys of the recipe for all models."""
    budgets: BudgetsConfig = field(default_factory=BudgetsConfig)
    """Of all sizes that have none of their own; may be left out where all have."""
    match: str = key("flops", choices=("flops", "gpu_hours", "parameters"))
    """What the kinds of a size have in common at a budget: flops, by the model's own count; gpu_hours that the first
    kind would take; or parameters, by the width of the SwiGLU, and with it tokens."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    rules: RulesConfig = field(default_factory=RulesConfig)
    repeats: RepeatsConfig = field(default_factory=RepeatsConfig)
    hold_out: HoldOutConfig | None = key(None)
    """Nothing is held out when left out."""
    targets: list[TargetConfig] = key([])
    """Models whose loss `plan` says how well the study will predict."""
    noise: float = key(0.003, below=1)
    """Standard deviation of a run's loss, relative, that `plan` reckons with."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    give_up: list[str] = key([])
    """Cells that have failed for good: they are not begun again, and what is held out does not wait for them."""

    @property
    def folder(self) -> Path:
        """Where its own files lie; its runs are in one that all studies share."""
        return STUDIES / self.study


def load_study(path: str | Path) -> Study:
    """Read a study file. Raises UserError for a missing or malformed file, an unknown key, a missing or impossible
    value."""
    if not Path(path).is_file():
        raise UserError(f"There is no study '{path}'; give the path of a YAML file such as recipes/studies/tiny.yaml.")
    tree = read_tree(Path(path))
    _spell_out(tree)
    study = merge(Study, [tree], [], str(path))
    _check(study)
    return study


def _spell_out(tree: DictConfig) -> None:
    """Short forms in their long form."""
    kinds = tree._get_node("kinds")
    if isinstance(kinds, DictConfig):
        for name, value in list(kinds.items_ex(resolve=False)):
            if isinstance(value, str):
                kinds[name] = {"pattern": value}
    if isinstance(tree.get("hold_out"), str):
        tree.hold_out = {"at": tree.hold_out}


def _check(study: Study) -> None:
    """Raises UserError for what no design can be made of."""
    for name, value, rules in keys(study):
        if fault := rules.fault(value):
            raise UserError(f"{name} is {value}; {fault}.")
    for part in ("sizes", "targets"):
        for number, each in enumerate(getattr(study, part)):
            for name, value, rules in keys(each, f"{part}[{number}]."):
                if fault := rules.fault(value):
                    raise UserError(f"{name} is {value}; {fault}.")
    for name in (study.study, *study.kinds):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"'{name}' is no name for a study or kind; use letters, digits, '-', '_' and '.'.")
    if study.study == "runs":
        raise UserError("study is 'runs', the folder of all studies' runs; give another name.")
    if not Path(study.base).is_file():
        raise UserError(f"base: there is no recipe '{study.base}'; give its path from the working directory.")
    for name in ("kinds", "sizes"):
        if not getattr(study, name):
            raise UserError(f"{name} is empty; give at least one.")
    _check_budgets(study)
    _refuse_twice("sizes", [f"{size.width}x{size.layers}" for size in study.sizes])
    _refuse_twice("rules.tune.factors", study.rules.tune.factors if study.rules.tune else [])


def _refuse_twice(name: str, values: list[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{name} has {value} twice; remove one.")


def _check_budgets(study: Study) -> None:
    own = {f"sizes[{number}].budgets": size.budgets for number, size in enumerate(study.sizes) if size.budgets}
    of_all = {"budgets": study.budgets} if study.budgets.units or len(own) < len(study.sizes) else {}
    for name, budgets in (of_all | own).items():
        if len(budgets.units) != 1:
            raise UserError(
                f"{name} needs one of flops, tokens_per_parameter and tokens, such as {{flops: [1.0e18, 3.0e18]}}."
            )
        _refuse_twice(name, budgets.values)
    held = study.hold_out
    if held is None:
        return
    parts = held.width, held.layers, held.units
    if (held.at is None) != all(parts) or (held.at and any(parts)) or len(held.units) > 1:
        raise UserError(
            "hold_out is either largest, or a size and a budget of its own, such as {width: 1024, layers: 16, flops: "
            "1.0e20}."
        )
