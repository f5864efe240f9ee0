"""A plan as text, at most 120 columns wide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from megahybrid.data.documents import TRAIN
from megahybrid.data.prepared import find_prepared
from megahybrid.scaling.plan import _table as table
from megahybrid.study.cells import batch_tokens
from megahybrid.study.identity import find_data
from megahybrid.study.plan import Plan, Row
from megahybrid.study.rules import BATCHES, LEARNING_RATES


def describe(plan: Plan) -> str:
    """Tables of models, runs and expected intervals, and sentences on costs, rules and data."""
    return "\n\n".join([_models(plan), _runs(plan), "\n".join(_sentences(plan)), _precision(plan)])


def short(value: float) -> str:
    """Three digits: 43.7M, 8.27G, 512."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= 0.9995 * limit:
            return f"{float(f'{value / limit:.3g}'):g}{suffix}"
    return f"{value:.3g}"


def _models(plan: Plan) -> str:
    rows = {}
    for row in plan.rows:
        cell = row.cell
        rows.setdefault(
            (cell.kind, cell.size),
            (
                *(cell.kind, cell.size, f"{cell.parameters:,}", f"{cell.parameters_without_embedding:,}"),
                *(f"{cell.flops_per_token / 1e6:,.1f}", f"{row.memory / 2**30:,.1f}", str(cell.nodes), str(cell.gpus)),
            ),
        )
    head = ("kind", "size", "parameters", "without embeddings", "MFLOPs a token", "GiB a GPU", "nodes", "GPUs")
    return table(head, list(rows.values()))


def _runs(plan: Plan) -> str:
    """Of the peak rate and the batch also what they are of the run's own optimum."""
    head = ("run", "role", "tokens", "FLOPs", "off", "rate", "of best", "batch", "of best", "steps", "GPU h")
    return table(head, [_run(row) for row in plan.rows])


def _run(row: Row) -> tuple[str, ...]:
    cell = row.cell
    return (
        *(cell.name, "held out" if cell.held_out else cell.role, short(cell.tokens)),
        *(f"{cell.flops:.3g}".replace("e+", "e"), f"{cell.flops / cell.asked - 1:+.2%}"),
        *(f"{cell.config.optimizer.learning_rate:.3g}", f"{row.rate:.2f}"),
        *(short(batch_tokens(cell.config)), f"{row.batch:.2f}"),
        *(f"{cell.config.train.steps:,}", f"{row.gpu_hours:,.3g}"),
    )


def _sentences(plan: Plan) -> Iterator[str]:
    study, rows = plan.study, plan.rows
    hours, alone = sum(row.gpu_hours for row in rows), sum(row.alone for row in rows)
    tokens = sum(row.cell.tokens * row.gpu_hours / row.alone for row in rows)
    flops = sum(row.cell.flops * row.gpu_hours / row.alone for row in rows)
    yield f"{len(rows)} runs, {short(tokens)} tokens, {flops:.3g} FLOPs, {hours:,.3g} GPU hours"
    if any(row.cell.role == "branch" for row in rows):
        yield f"separate runs would take {alone:,.3g} GPU hours: branching off saves {1 - hours / alone:.0%}"
    yield f"learning rate: {study.rules.learning_rate}, {LEARNING_RATES[study.rules.learning_rate].source}"
    yield f"batch: {study.rules.batch}, {BATCHES[study.rules.batch].source}"
    if study.rules.tune:
        yield "tuning: the best factor of a kind's grid multiplies its other rates; these runs wait for it"
    for config in {row.cell.kind: row.cell.config for row in rows}.values():
        identity = find_data(config)
        yield f"data: {identity or f'not prepared yet; run `megahybrid prepare {study.base}`'}"
        break
    prepared = find_prepared(Path(str(rows[0].cell.config.data.path)).expanduser())
    if prepared is not None:
        longest, there = max(row.cell.tokens for row in rows), prepared.samples(TRAIN) * prepared.seq_length
        again = f": it reads them {longest / there:.2f} times" if longest > there else ""
        yield f"the longest run takes {short(longest)} of {short(there)} tokens that were prepared{again}"


def _precision(plan: Plan) -> str:
    """95 % intervals, half as wide each, relative."""
    study, kinds = plan.study, plan.precision
    targets = [f"{short(each.parameters)}, {short(each.tokens)}" for each in study.targets]
    names = [*targets, *(["held out"] if study.hold_out else [])]
    rows = [
        (kind, f"{each.condition:.1e}", f"{each.a_opt:.3f}", *(f"{loss:.2%}" for loss in each.losses))
        for kind, each in kinds.items()
    ]
    first, *others = kinds
    for kind in others:
        both = (math.hypot(*pair) for pair in zip(kinds[first].losses, kinds[kind].losses, strict=True))
        rows.append((f"{kind} - {first}", "", f"{math.hypot(kinds[first].a_opt, kinds[kind].a_opt):.3f}", *(f"{each:.2%}" for each in both)))
    title = f"expected 95 % intervals, ±, at {study.noise:.2%} noise"
    return table((title, "condition", "a_opt", *names), rows)
