"""From a study file to its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megahybrid.errors import UserError
from megahybrid.study.cells import RETRY, Cell, Family
from megahybrid.study.file import SizeConfig, Study
from megahybrid.study.models import Counts, Model, make_models, seconds_per_token


def design(
    study: Study,
    tuned: Mapping[str, float] = MappingProxyType({}),
    needs_data: bool = True,
    known: Mapping[tuple[str, str], Counts] = MappingProxyType({}),
) -> list[Cell]:
    """All runs of a study, kind by kind: its tuning grid, then size by size a trunk before its branches.

    Args:
        study: as `load_study` gives it.
        tuned: the best factor on the learning rate of every kind whose grid is done.
        needs_data: whether data that are not prepared are a fault; without them no identity means anything.
        known: by kind and size, what need not be counted again of a model.

    Raises UserError, with the cell's name, for what cannot be trained, for two cells that are the same run,
    and where one is given up that there is not.
    """
    cells: list[Cell] = []
    rungs = _rungs(study, known)
    for kind in study.kinds:
        families = [_family(study, rung, kind, needs_data) for rung in rungs]
        smallest = next(family for family, rung in zip(families, rungs, strict=True) if rung.smallest)
        grid = smallest.grid()
        awaits = () if kind in tuned else tuple(cell.identity for cell in grid)
        cells += grid
        for family, rung in zip(families, rungs, strict=True):
            for seed in range(rung.repeats):
                cells += family.cells(seed, tuned.get(kind, 1.0), awaits)
    _refuse_doubles(cells)
    names = {cell.name + retry for cell in cells for retry in ("", RETRY)}
    if unknown := [name for name in study.give_up if name not in names]:
        raise UserError(f"give_up has {unknown[0]}, which is no cell of the study; `megahybrid study status` has all.")
    return cells


@dataclass(frozen=True)
class _Rung:
    """A size with its budgets.

    Attributes:
        models: by kind.
        budgets: ascending.
        unit: of the budgets, see megahybrid.study.file.UNITS.
        held_out: the budget whose run is held out, or None.
        smallest: whether it is the smallest size.
        repeats: runs of each budget.
    """

    models: Mapping[str, Model]
    budgets: Sequence[float]
    unit: str
    held_out: float | None
    smallest: bool
    repeats: int


def _rungs(study: Study, known: Mapping[tuple[str, str], Counts]) -> list[_Rung]:
    """The sizes, and the one of its own that may be held out."""
    held, rungs = study.hold_out, []
    sizes = [(make_models(study, size, known), size.budgets or study.budgets) for size in study.sizes]
    costs = [next(iter(models.values())).flops_per_token for models, _ in sizes]
    for number, (models, budgets) in enumerate(sizes):
        smallest, largest = number == costs.index(min(costs)), number == costs.index(max(costs))
        repeats = study.repeats.seeds if smallest or study.repeats.at == "all" else 1
        out = budgets.values[-1] if largest and held and held.at else None
        rungs.append(_Rung(models, budgets.values, budgets.units[0], out, smallest, repeats))
    if held and not held.at:
        budget = getattr(held, held.units[0])
        models = make_models(study, SizeConfig(held.width, held.layers, held.overrides, held.nodes), known)
        rungs.append(_Rung(models, [budget], held.units[0], budget, False, 1))
    return rungs


def _family(study: Study, rung: _Rung, kind: str, needs_data: bool) -> Family:
    """A kind's runs at a size, with the tokens that each budget gives it: the first kind's, or as many as take what
    is matched."""
    model, first = rung.models[kind], next(iter(rung.models.values()))
    share = {
        "flops": lambda: first.flops_per_token / model.flops_per_token,
        "gpu_hours": lambda: seconds_per_token(first) / seconds_per_token(model),
        "parameters": lambda: 1.0,
    }[study.match]()
    a_unit = {"flops": 1 / first.flops_per_token, "tokens_per_parameter": first.parameters, "tokens": 1}[rung.unit]
    asked = {budget: budget * a_unit * share for budget in rung.budgets}
    family = Family(study, model, asked, rung.held_out)
    if needs_data and family.data is None:
        raise UserError(
            f"data.path '{model.config.data.path}' holds no prepared data; run `megahybrid prepare {study.base}` first."
        )
    return family


def _refuse_doubles(cells: Sequence[Cell]) -> None:
    """A run of the tuning grid may be one of the others'."""
    seen: dict[str, str] = {}
    for cell in cells:
        if cell.role == "tune":
            continue
        if cell.identity in seen:
            raise UserError(
                f"{seen[cell.identity]} and {cell.name} are the same run; remove a kind, a size or a budget."
            )
        seen[cell.identity] = cell.name
