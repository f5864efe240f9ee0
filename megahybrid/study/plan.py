"""What a study takes, before anything is started: a row a run, what trunks save, and how well it will predict."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahybrid.errors import UserError
from megahybrid.files import write_text
from megahybrid.scaling.memory import peak_bytes
from megahybrid.study.cells import Cell, batch_tokens, optimum
from megahybrid.study.design import design
from megahybrid.study.expected import Precision, expect
from megahybrid.study.file import Study

STUDIES = Path("studies")
"""Where every study has a folder of its name."""


@dataclass(frozen=True)
class Row:
    """A run and its cost.

    Attributes:
        cell: the run.
        rate, batch: the peak rate and tokens of a batch, by what the rules say of its own tokens.
        memory: bytes a GPU.
        gpu_hours: of what it trains itself, which of a branch is its decay.
        alone: GPU hours of it from scratch.
    """

    cell: Cell
    rate: float
    batch: float
    memory: float
    gpu_hours: float
    alone: float


@dataclass(frozen=True)
class Plan:
    """A study's rows and, by kind, what its fit is expected to know."""

    study: Study
    rows: list[Row]
    precision: dict[str, Precision]


def make_plan(study: Study) -> Plan:
    """Raises UserError for what cannot be trained, and for a design that cannot tell the law's terms apart."""
    cells = design(study, needs_data=False)
    precision = expect(study, cells)
    memory: dict[tuple[str, str, int], float] = {}
    rows = []
    for cell in cells:
        train, parallel = cell.config.train, cell.config.parallel
        model = cell.kind, cell.size, train.micro_batch_size
        if model not in memory:
            memory[model] = max(peak_bytes(cell.config, cell.gpus // (parallel.tensor * parallel.pipeline)))
        rate, batch = optimum(study, cell.config, cell.parameters_without_embedding, cell.tokens)
        hours = _gpu_hours(cell)
        own = 1 - (cell.branch_step or 0) / train.steps
        rows.append(
            Row(
                cell,
                cell.config.optimizer.learning_rate / rate,
                batch_tokens(cell.config) / batch,
                memory[model],
                hours * own,
                hours,
            )
        )
    return Plan(study, rows, precision)


def _gpu_hours(cell: Cell) -> float:
    return cell.flops / (989e12 * 0.3) / 3600


def check_limits(plan: Plan) -> None:
    """Raises UserError where the study takes more GPU hours than its limits allow."""
    limit, hours = plan.study.limits.gpu_hours, sum(row.gpu_hours for row in plan.rows)
    if limit is not None and hours > limit:
        raise UserError(
            f"The study takes {hours:,.3g} GPU hours, more than limits.gpu_hours ({limit:g}); lower budgets, or raise it."
        )


def save(plan: Plan, file: Path) -> Path:
    """Write plan.csv, and a copy of the study's file, into the study's folder, which is returned."""
    folder = STUDIES / plan.study.study
    text = io.StringIO()
    writer = csv.DictWriter(text, list(_fields(plan.rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_fields, plan.rows))
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
        "gpu_hours": row.gpu_hours,
        "gpu_hours_from_scratch": row.alone,
    }
