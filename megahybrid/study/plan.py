"""What a study takes, before anything is started: a row a run, what trunks save, and how well it will predict."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megahybrid.config import Config
from megahybrid.errors import UserError
from megahybrid.files import write_text
from megahybrid.scaling.hours import Estimate, own_steps
from megahybrid.scaling.memory import peak_bytes
from megahybrid.study.cells import Cell, batch_tokens, optimum
from megahybrid.study.design import design
from megahybrid.study.expected import Precision, expect
from megahybrid.study.file import Study
from megahybrid.study.identity import find_data
from megahybrid.study.models import tabled_estimate


@dataclass(frozen=True)
class Row:
    """A run and its cost.

    Attributes:
        cell: the run.
        rate, batch: its peak rate and tokens of a batch, divided by what the rules say of its own tokens.
        memory: bytes a GPU.
        estimate: of the time that it takes.
    """

    cell: Cell
    rate: float
    batch: float
    memory: float
    estimate: Estimate

    @property
    def part(self) -> float:
        """What of its tokens it trains itself: of a branch those after its trunk's."""
        return self.estimate.steps / self.cell.config.train.steps

    @property
    def hours_from_scratch(self) -> float:
        """GPU hours if it had no trunk."""
        return replace(self.estimate, steps=self.cell.config.train.steps).hours


@dataclass(frozen=True)
class Plan:
    """A study's rows and, by kind, what its fit is expected to know."""

    study: Study
    rows: list[Row]
    precision: dict[str, Precision]

    @property
    def gpu_hours(self) -> float:
        """Of all runs, one after another."""
        return sum(row.estimate.hours for row in self.rows)


def make_plan(study: Study, estimate: Callable[[Config], Estimate] = tabled_estimate) -> Plan:
    """The plan of a study, without the runs that are given up, with GPU hours from a table, or as something else
    estimates those of a recipe.

    Raises UserError for what cannot be trained, and for a design that cannot tell the law's terms apart.
    """
    cells = [cell for cell in design(study, needs_data=False) if cell.name not in study.give_up]
    precision = expect(study, cells)
    planned = {cell.identity for cell in cells}
    known: dict[tuple[str, str, int], tuple[float, Estimate]] = {}
    rows = []
    for cell in cells:
        step = (cell.kind, cell.size, cell.config.train.global_batch_size)
        if step not in known:
            memory = max(peak_bytes(cell.config, cell.gpus // cell.config.parallel.replica))
            known[step] = memory, estimate(cell.config)
        memory, like = known[step]
        rate, batch = optimum(study, cell.config, cell.parameters_without_embedding, cell.tokens)
        orphan = cell.trunk not in planned  # given up: it may have left no checkpoint to begin with
        rows.append(
            Row(
                cell=cell,
                rate=cell.config.optimizer.learning_rate / rate,
                batch=batch_tokens(cell.config) / batch,
                memory=memory,
                estimate=replace(like, steps=cell.config.train.steps if orphan else own_steps(cell.config)),
            )
        )
    return Plan(study, rows, precision)


def check_limits(plan: Plan) -> None:
    """Raises UserError where the study takes more GPU hours than its limits allow."""
    limit, hours = plan.study.limits.gpu_hours, plan.gpu_hours
    if limit is not None and hours > limit:
        raise UserError(
            f"The study takes {hours:,.3g} GPU hours, more than limits.gpu_hours ({limit:g}); lower budgets, or raise "
            "the limit."
        )


def save(plan: Plan, file: Path) -> Path:
    """Write plan.csv, and a copy of the study's file, into the study's folder, which is returned."""
    folder, data = plan.study.folder, find_data(plan.rows[0].cell.config) or ""
    rows, text = [_fields(row) | {"data": data} for row in plan.rows], io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    source = file.read_text(encoding="utf-8")
    write_text(folder / "plan.csv", text.getvalue())
    write_text(folder / "study.yaml", source)
    return folder


def _fields(row: Row) -> dict[str, Any]:
    """A row of plan.csv; columns that runs.csv has, too, have its names."""
    cell, config = row.cell, row.cell.config
    return {
        "cell": cell.name,
        "run": cell.identity,
        "kind": cell.kind,
        "size": cell.size,
        "budget": cell.budget,
        "seed": cell.seed,
        "role": cell.role,
        "trunk": cell.trunk,
        "branch_step": cell.branch_step,
        "held_out": int(cell.held_out),
        "awaits": " ".join(cell.awaits),
        "parameters": cell.parameters,
        "parameters_without_embedding": cell.parameters_without_embedding,
        "tokens": cell.tokens,
        "flops_asked": cell.asked,
        "flops": cell.flops,
        "difference": cell.flops / cell.asked - 1,
        "flops_per_token": cell.flops_per_token,
        "learning_rate": config.optimizer.learning_rate,
        "learning_rate_by_optimum": row.rate,
        "batch_tokens": batch_tokens(config),
        "batch_by_optimum": row.batch,
        "warmup_steps": config.optimizer.warmup_steps,
        "steps": config.train.steps,
        "memory_gib": row.memory / 2**30,
        "nodes": cell.nodes,
        "gpus": cell.gpus,
        "gpu_hours": row.estimate.hours,
        "gpu_hours_from_scratch": row.hours_from_scratch,
    }
