"""The runs of a kind at a size: batch, learning rate, steps, trunks and branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megahybrid.config import Config
from megahybrid.config.branching import decay_start
from megahybrid.config.validate import check_replicas, validate
from megahybrid.errors import UserError
from megahybrid.study.file import STUDIES, Study
from megahybrid.study.identity import find_data, identify
from megahybrid.study.models import Model
from megahybrid.study.rules import BATCHES, LEARNING_RATES, Subject

RUNS = STUDIES / "runs"
"""Where the runs of all studies lie, each in a folder named by its identity."""
RETRY = "-half"
"""Ends the name of a cell that is tried again, at half the rate."""
TOLERANCE = 0.01
"""Most that realised FLOPs differ from those asked for, relative."""


@dataclass(frozen=True)
class Cell:
    """A run of a study.

    Attributes:
        name: such as "lalte-512x8-3e18-s0"; unlike the identity, of this study alone.
        budget: as the file has it.
        seed: the number of the repeat, from 0.
        role: "tune", "single", "trunk" or "branch".
        config: complete, with run.dir, and train.branch_from of a branch.
        identity: see megahybrid.study.identity; of two cells with the same one only one run is needed.
        trunk: the identity of its trunk; its own where it is none's branch.
        branch_step: the step of its trunk from which a branch goes on.
        held_out: whether it is kept from fits, and run last.
        retry_of: the identity of the run that diverged, of a retry.
        awaits: identities of the runs that decide its learning rate; until it is known the cell, its identity too,
            holds what the rule says.
        nodes, gpus: that it runs on, GPUs over all nodes.
        parameters: all of the model's.
        parameters_without_embedding: without embedding and output layer.
        flops_per_token: of forward and backward pass.
        tokens: that are trained on, those of the trunk up to branch_step included.
        flops: of all these tokens.
        asked: FLOPs that the budget asks for.
    """

    name: str
    kind: str
    size: str
    budget: float
    seed: int
    role: str
    config: Config
    identity: str
    trunk: str
    branch_step: int | None
    held_out: bool
    retry_of: str | None
    awaits: tuple[str, ...]
    nodes: int
    gpus: int
    parameters: int
    parameters_without_embedding: int
    flops_per_token: float
    tokens: int
    flops: float
    asked: float


class Family:
    """A kind at a size, and its runs.

    Attributes:
        asked: tokens by budget, ascending; `held_out` is the budget that is held out, or None.
    """

    def __init__(self, study: Study, model: Model, asked: dict[float, float], held_out: float | None):
        self.study, self.model, self.asked, self.held_out = study, model, asked, held_out
        self.data = find_data(model.config)
        self.branched = study.schedule.kind == "wsd_branches" and len(asked) > 1
        groups = [list(asked)] if self.branched else [[budget] for budget in asked]
        self._recipes = {budget: self._recipe(group) for group in groups for budget in group}

    def grid(self) -> list[Cell]:
        """The tuning grid, of separate runs at the smallest budget, about what the rules say of it alone."""
        tune, budget = self.study.rules.tune, min(self.asked)
        if tune is None:
            return []
        alone = self._recipe([budget])
        return [self._cell(budget, 0, "tune", factor, recipe=alone) for factor in tune.factors]

    def cells(self, seed: int, factor: float, awaits: tuple[str, ...]) -> list[Cell]:
        """A run of every budget, trunk first; the one that is held out in the first repeat only."""
        budgets = [budget for budget in self.asked if seed == 0 or budget != self.held_out]
        fitted = [budget for budget in budgets if budget != self.held_out]
        if not self.branched or len(budgets) < 2:
            return [self._cell(budget, seed, "single", factor, awaits) for budget in budgets]
        # What is held out begins when all else is done: it goes on from the trunk, too, in place of its decay.
        trunk_budget = fitted[-1]
        starts = {each: self._decay_start(min(each, trunk_budget)) for each in budgets if each != trunk_budget}
        trunk = self._cell(trunk_budget, seed, "trunk", factor, awaits, milestones=sorted(set(starts.values())))
        branches = (
            self._cell(budget, seed, "branch", factor, awaits, trunk=trunk, step=step)
            for budget, step in starts.items()
        )
        return [trunk, *branches]

    def _recipe(self, group: Sequence[float]) -> Config:
        """What a trunk and its branches share: the rules' rate and batch at the geometric mean of their tokens, and
        the warm-up."""
        study, config, tokens = self.study, self.model.config, [self.asked[budget] for budget in group]
        rate, batch = optimum(study, config, self.model.parameters_without_embedding, geometric_mean(tokens))
        try:
            samples = whole_batch(batch / config.train.seq_length, self.model.replicas, tokens, config.train.seq_length)
        except UserError as error:
            raise UserError(f"Cell {self._name(group[0], 0)}: {error}") from error
        share = samples // self.model.replicas
        micro = max(each for each in range(1, config.train.micro_batch_size + 1) if share % each == 0)
        warmup = study.schedule.warmup_tokens or self.model.parameters
        optimizer = replace(
            config.optimizer,
            learning_rate=float(f"{rate:.4g}"),
            warmup_steps=round(warmup / (samples * config.train.seq_length)),
            schedule="cosine" if study.schedule.kind == "cosine" else "wsd",
            decay_fraction=study.schedule.decay,
        )
        train = replace(config.train, global_batch_size=samples, micro_batch_size=micro)
        return replace(config, train=train, optimizer=optimizer)

    def _cell(
        self,
        budget: float,
        seed: int,
        role: str,
        factor: float,
        awaits: tuple[str, ...] = (),
        milestones: Sequence[int] = (),
        trunk: Cell | None = None,
        step: int | None = None,
        recipe: Config | None = None,
    ) -> Cell:
        recipe, model = recipe or self._recipes[budget], self.model
        name = self._name(budget, seed) + (f"-x{factor:g}" if role == "tune" else "")
        steps = self._steps(budget, recipe)
        tokens = steps * batch_tokens(recipe)
        rate = float(f"{recipe.optimizer.learning_rate * factor:.4g}")
        branch = f"{trunk.config.run.dir}@{step}" if trunk else None
        config = replace(
            recipe,
            train=replace(recipe.train, steps=steps, seed=recipe.train.seed + seed, branch_from=branch),
            optimizer=replace(recipe.optimizer, learning_rate=rate),
            checkpoint=replace(recipe.checkpoint, milestones=list(milestones)),
            tracking=replace(recipe.tracking, name=name, group=self.study.study),
        )
        identity = identify(config, self.data)
        config = replace(config, run=replace(config.run, dir=str(RUNS / identity)))
        self._check(name, config)
        return Cell(
            name=name,
            kind=model.kind,
            size=model.size,
            budget=budget,
            seed=seed,
            role=role,
            config=config,
            identity=identity,
            trunk=trunk.identity if trunk else identity,
            branch_step=step,
            held_out=budget == self.held_out and role != "tune",
            retry_of=None,
            awaits=awaits,
            nodes=model.nodes,
            gpus=model.gpus,
            parameters=model.parameters,
            parameters_without_embedding=model.parameters_without_embedding,
            flops_per_token=model.flops_per_token,
            tokens=tokens,
            flops=tokens * model.flops_per_token,
            asked=self.asked[budget] * model.flops_per_token,
        )

    def _name(self, budget: float, seed: int) -> str:
        return f"{self.model.kind}-{self.model.size}-{budget_name(budget)}-s{seed}"

    def _steps(self, budget: float, recipe: Config) -> int:
        return round(self.asked[budget] / batch_tokens(recipe))

    def _decay_start(self, budget: float) -> int:
        recipe = self._recipes[budget]
        return decay_start(recipe.optimizer, self._steps(budget, recipe))

    def _check(self, name: str, config: Config) -> None:
        """Raises UserError, with the cell's name, for what cannot be trained."""
        warm, steps = config.optimizer.warmup_steps, config.train.steps
        peak = steps - 1 if config.optimizer.schedule == "cosine" else decay_start(config.optimizer, steps)
        if warm > peak:
            raise UserError(
                f"Cell {name}: its warm-up of {warm:,} steps is not over when its rate begins to fall after "
                f"{peak:,} of {steps:,}; lower schedule.warmup_tokens, or raise its budget."
            )
        try:
            validate(config)
            check_replicas(config, self.model.replicas)
        except UserError as error:
            raise UserError(f"Cell {name}: {error}") from error


def optimum(study: Study, config: Config, parameters: int, tokens: float) -> tuple[float, float]:
    """What the study's rules say of a model of so many parameters, without embeddings, that is trained on so many
    tokens: peak rate, and tokens of a batch; where a rule is `fixed` the configuration's."""
    subject = Subject(parameters, config.optimizer.learning_rate, batch_tokens(config))
    rate, batch = LEARNING_RATES[study.rules.learning_rate], BATCHES[study.rules.batch]
    return rate.value(subject, tokens), batch.value(subject, tokens)


def batch_tokens(config: Config) -> int:
    """Tokens of a step."""
    return config.train.global_batch_size * config.train.seq_length


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def budget_name(budget: float) -> str:
    """3e18, 20, 2.4e7."""
    return f"{budget:g}".replace("e+0", "e").replace("e+", "e")


def whole_batch(wanted: float, replicas: int, tokens: Sequence[float], length: int) -> int:
    """Samples of a batch, near the number that is wanted.

    A round number: a multiple of the power of two that goes 8 to 16 times into what is wanted, so that GPUs can share
    it; where whole steps of it would miss the tokens of a run by more than TOLERANCE, of a smaller one.

    Args:
        wanted: samples that the rule asks for.
        replicas: data parallel ones, which share it evenly.
        tokens: of the runs that have this batch.
        length: tokens of a sample.

    Raises UserError where there is none within a quarter of what is wanted, nor the whole number beside it.
    """
    unit = 2 ** max(0, math.floor(math.log2(max(1.0, wanted) / 8)))
    while unit >= 1:
        few, many = wanted / unit / 1.25, wanted / unit * 1.25
        near = range(
            max(1, min(math.ceil(few), int(wanted / unit))), max(math.floor(many), math.ceil(wanted / unit)) + 1
        )
        for units in sorted(near, key=lambda each: abs(math.log(each * unit / wanted))):
            batch = units * unit
            if batch % replicas == 0 and all(_missed(each, batch * length) <= TOLERANCE for each in tokens):
                return batch
        unit //= 2
    raise UserError(
        f"no batch near {wanted * length:,.0f} tokens, {length:,} a sample, shared by {replicas} replicas, comes "
        f"within {TOLERANCE:.0%} of {min(tokens):,.0f} tokens in whole steps; raise the budget, lower "
        "train.seq_length or the nodes, or take another rule for the batch."
    )


def _missed(tokens: float, batch: int) -> float:
    """By how much whole steps miss the tokens, relative."""
    return abs(round(tokens / batch) * batch / tokens - 1)
