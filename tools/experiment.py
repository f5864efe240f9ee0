"""An experiment: arms that are trained and evaluated alike, and the statement that decides what came out of it.

The file says all of it before anything runs:

    statement: In one sentence, what must hold for this to pass.
    recipe: recipes/recall.yaml
    common: [train.steps=4600]                    # key=value, of all runs
    settings: {n28: [model.lte.buffer_size=64]}   # each arm runs in each; one without changes when left out
    arms: {full: ["model.pattern=(GF)*2"], lalte: []}
    rates: [1.0e-3, 2.0e-3]                       # learning rates to choose from; the recipe's when left out
    choose: beyond@1                              # what the best rate is best in, for each arm and setting,
    choose_seed: 0                                # with this seed, which is none of the results
    seeds: [1, 2, 3]
    more_seeds: {lalte: [4, 5]}                   # of single arms
    samples: 64                                   # what `eval` asks
    lengths: [1, 4, 16]                           # of it, in training's
    ask: [--task, niah_single_2]                  # and more that `eval` is told
    policies: {lalte: [random, oracle]}           # swapped in at training's length
    given: [{quantity: beyond@1, arm: full, at_least: 0.99}]             # or else nothing can be concluded
    passes: [{quantity: beyond@1, arm: lalte, above: gdn, by: 0.2}]      # in every pair of seeds

A quantity is `beyond@F` or `all@F`, the accuracy beyond the window or of all answers at F times training's length, with
a policy as in `beyond@1:oracle`, the mean over tasks; or `metric:KEY`, `metric:KEY.INDEX` of the last line of
metrics.jsonl that has it, or `metric:KEY.INDEX@N`, the least of the last N that have it.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megahybrid.errors import UserError
from tools.experiment_checks import Check, Row

NO_RUNS = "none of its runs"
"""All that is told of a setting of which the table has no run."""


@dataclass(frozen=True)
class Run:
    """One of an experiment's runs; `rate` is None for the recipe's own learning rate."""

    setting: str
    arm: str
    seed: int
    rate: float | None

    @property
    def path(self) -> Path:
        """Its run directory in the experiment's folder."""
        rate = "" if self.rate is None else f",rate={self.rate:g}"
        return Path(self.setting) / self.arm / f"seed={self.seed}{rate}"


@dataclass
class Experiment:
    """A file in docs/evidence, read."""

    statement: str
    recipe: str
    arms: dict[str, list[str]]
    seeds: list[int]
    passes: list[Check]
    given: list[Check] = field(default_factory=list)
    common: list[str] = field(default_factory=list)
    settings: dict[str, list[str]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    choose: str | None = None
    choose_seed: int = 0
    more_seeds: dict[str, list[int]] = field(default_factory=dict)
    samples: int = 64
    lengths: list[int] = field(default_factory=lambda: [1])
    ask: list[str] = field(default_factory=list)
    policies: dict[str, list[str]] = field(default_factory=dict)

    @property
    def quantities(self) -> list[str]:
        """All that a run is measured by."""
        asked = [f"beyond@{factor}" for factor in self.lengths]
        policies = sorted(set(itertools.chain.from_iterable(self.policies.values())))
        asked += [f"beyond@1:{policy}" for policy in policies]
        checked = [check.quantity for check in (*self.given, *self.passes)]
        return list(dict.fromkeys([*asked, *checked, *filter(None, [self.choose])]))

    def seeds_of(self, arm: str) -> list[int]:
        """Those that count."""
        return [*self.seeds, *self.more_seeds.get(arm, [])]

    def asked_of(self, arm: str) -> list[str]:
        """What a run of this arm has to be measured by for all that is evaluated and checked."""
        policies = [f"beyond@1:{policy}" for policy in self.policies.get(arm, [])]
        checked = [check.quantity for check in (*self.given, *self.passes) if arm in check.arms]
        chosen = [self.choose] if self.choose and len(self.rates) > 1 else []
        return [*(f"beyond@{factor}" for factor in self.lengths), *policies, *checked, *chosen]

    def cells(self, only: Sequence[str]) -> list[tuple[str, str]]:
        """Setting and arm, of all or of those that are named. Raises UserError for other names."""
        if unknown := set(only) - self.arms.keys() - self.settings.keys():
            raise UserError(f"'{min(unknown)}' is neither an arm nor a setting of the experiment.")
        settings = [each for each in self.settings if each in only] or list(self.settings)
        arms = [each for each in self.arms if each in only] or list(self.arms)
        return list(itertools.product(settings, arms))

    def choosing(self, cells: Iterable[tuple[str, str]]) -> list[Run]:
        """The runs by which learning rates are chosen."""
        rates = self.rates if len(self.rates) > 1 else []
        return [Run(setting, arm, self.choose_seed, rate) for setting, arm in cells for rate in rates]

    def counting(self, cells: Iterable[tuple[str, str]], rows: Sequence[Row]) -> list[Run]:
        """The runs that count, of those cells whose rate is known."""
        rates = {(setting, arm): self._rate(setting, arm, rows) for setting, arm in cells}
        return [
            Run(setting, arm, seed, rate)
            for (setting, arm), (known, rate) in rates.items()
            for seed in self.seeds_of(arm)
            if known
        ]

    def _rate(self, setting: str, arm: str, rows: Sequence[Row]) -> tuple[bool, float | None]:
        """Whether a cell's learning rate is known, and which it is."""
        if len(self.rates) < 2:
            return True, self.rates[0] if self.rates else None
        place = setting, arm, self.choose_seed
        tried = [row for row in rows if (row["setting"], row["arm"], row["seed"]) == place]
        tried = [row for row in tried if row[self.choose] is not None]
        sign = -1 if "loss" in str(self.choose) else 1
        return bool(tried), max(tried, key=lambda row: sign * row[self.choose])["rate"] if tried else None

    def overrides(self, run: Run) -> list[str]:
        """What a run has beside the recipe."""
        rate = [] if run.rate is None else [f"optimizer.learning_rate={run.rate:g}"]
        return [*self.common, *self.settings[run.setting], *self.arms[run.arm], *rate, f"train.seed={run.seed}"]


def read(path: Path) -> Experiment:
    """Raises UserError for a file that is no experiment."""
    try:
        tree = OmegaConf.load(path)
        experiment = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Experiment), tree))
    except FileNotFoundError as error:
        raise UserError(f"There is no experiment '{path}'; see docs/evidence.md for those that there are.") from error
    except OmegaConfBaseException as error:
        raise UserError(f"'{path}': {str(error).splitlines()[0]}.") from error
    experiment.settings = experiment.settings or {"all": []}
    for check in (*experiment.given, *experiment.passes):
        _check(check, experiment, path)
    if len(experiment.rates) > 1 and experiment.choose is None:
        raise UserError(f"'{path}' has several rates; say by which quantity to choose.")
    if experiment.choose_seed in {*experiment.seeds, *itertools.chain(*experiment.more_seeds.values())}:
        raise UserError(f"'{path}': choose_seed is {experiment.choose_seed}, which is a seed of the results.")
    return experiment


def _check(check: Check, experiment: Experiment, path: Path) -> None:
    if not re.fullmatch(r"(beyond|all)@\d+(:\w+)?|metric:\w+(\.\d+)?(@[1-9]\d*)?", check.quantity):
        raise UserError(
            f"'{path}': a check is of '{check.quantity}'; write beyond@1, all@4, beyond@1:oracle or metric:KEY."
        )
    others = [check.above, check.below, check.not_below]
    if sum(bound is not None for bound in (check.at_least, check.at_most, *others)) != 1:
        raise UserError(
            f"'{path}': a check of '{check.arm}' needs one of at_least, at_most, above, below and not_below."
        )
    for arm in check.arms:
        if arm not in experiment.arms:
            raise UserError(f"'{path}': a check names '{arm}', which is none of the arms.")
    for setting in check.settings:
        if setting not in experiment.settings:
            raise UserError(f"'{path}': a check names '{setting}', which is none of the settings.")


def measure(run: Path, quantity: str, length: int) -> float | None:
    """A quantity of a run whose training's length it is; None where it is not known."""
    if quantity.startswith("metric:"):
        return _metric(run / "metrics.jsonl", quantity.removeprefix("metric:"))
    kind, _, rest = quantity.partition("@")
    factor, _, policy = rest.partition(":")
    results = sorted(run.glob("evaluations/step_*/results.json"), key=lambda path: int(path.parent.name.split("_")[1]))
    found = [
        (entry["beyond"] if kind == "beyond" else entry)["accuracy"]
        for entry in (json.loads(results[-1].read_text())["results"] if results else [])
        if entry["length"] == int(factor) * length and entry["policy"] == (policy or "learned")
    ]
    return statistics.fmean(found) if found and None not in found else None


def _metric(path: Path, quantity: str) -> float | None:
    name, _, count = quantity.partition("@")
    key, _, index = name.partition(".")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    found = [line[key] for line in lines if key in line]
    if index:
        found = [None if value is None else value[int(index)] for value in found]
    last = int(count or 1)
    return min(found[-last:]) if len(found) >= last and None not in found[-last:] else None


def verdict(experiment: Experiment, setting: str, rows: Iterable[Row]) -> tuple[str, list[str]]:
    """Of a setting: PASS, FAIL, INCONCLUSIVE where what is `given` does not hold, or MISSING where what is known leaves
    it open; and why, a line a check, none where nothing is asked of it."""
    here = [row for row in rows if row["setting"] == setting]
    given, passes = ([x for x in checks if x.asked_in(setting)] for checks in (experiment.given, experiment.passes))
    if not here and (given or passes):
        return "MISSING", [NO_RUNS]
    seeds = {arm: experiment.seeds_of(arm) for arm in experiment.arms}
    outcome = "PASS"
    for checks, otherwise in ((passes, "FAIL"), (given, "INCONCLUSIVE")):  # what is given has the last word
        held = {check.holds(here, seeds) for check in checks}
        if held - {True}:
            outcome = otherwise if False in held else "MISSING"
    return outcome, [check.told(here, seeds) for check in (*given, *passes)]
