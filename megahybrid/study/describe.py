"""A plan as text, at most 120 columns wide."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megahybrid.data.documents import TRAIN
from megahybrid.data.lengths import sequence_lengths
from megahybrid.data.prepared import find_prepared
from megahybrid.readable import short
from megahybrid.scaling.layouts import CLUSTER
from megahybrid.scaling.plan import table
from megahybrid.study.cells import batch_tokens
from megahybrid.study.identity import find_data
from megahybrid.study.law.law import BARELY, CONDITION_LIMIT
from megahybrid.study.models import side_by_side
from megahybrid.study.plan import Plan, Row
from megahybrid.study.rules import BATCHES, LEARNING_RATES

FAR = 4
"""Times the FLOPs of the largest fitted run, from which on a held-out one tests the law."""


BLOCKS = 4
"""Blocks of shuffled samples that a run has to read, or all data, for its data to be like those of longer runs."""


def describe(plan: Plan) -> str:
    """Tables of models, runs and expected intervals, and sentences on costs, rules and data."""
    return "\n\n".join([_models(plan), _runs(plan), "\n".join(_sentences(plan)), _precision(plan)])


def _models(plan: Plan) -> str:
    rows = {}
    for row in plan.rows:
        cell = row.cell
        rows.setdefault(
            (cell.kind, cell.size),
            (
                *(cell.kind, cell.size, f"{cell.parameters:,}", f"{cell.parameters_without_embedding:,}"),
                *(f"{cell.flops_per_token / 1e6:,.1f}", f"{row.memory / 2**30:,.1f}"),
                *(str(cell.nodes), str(cell.gpus)),
            ),
        )
    head = ("kind", "size", "parameters", "no embeddings", "MFLOPs a token", "GiB a GPU", "nodes", "GPUs")
    return table(head, list(rows.values()))


def _runs(plan: Plan) -> str:
    head = ("run", "role", "tokens", "FLOPs", "realised", "rate", "/ rule", "batch", "/ rule", "steps", "GPU h")
    return table(head, [_run(row) for row in plan.rows])


def _run(row: Row) -> tuple[str, ...]:
    cell = row.cell
    return (
        *(cell.name, "held out" if cell.held_out else cell.role, short(cell.tokens)),
        *(f"{cell.asked:.3g}".replace("e+", "e"), f"{cell.flops / cell.asked - 1:+.2%}"),
        *(f"{cell.config.optimizer.learning_rate:.3g}", f"{row.rate:.2f}"),
        *(short(batch_tokens(cell.config)), f"{row.batch:.2f}"),
        *(f"{cell.config.train.steps:,}", f"{row.estimate.hours:,.3g}"),
    )


def _sentences(plan: Plan) -> Iterator[str]:
    study, rows, hours = plan.study, plan.rows, plan.gpu_hours
    alone = sum(row.hours_from_scratch for row in rows)
    tokens, flops = (sum(getattr(row.cell, name) * row.part for row in rows) for name in ("tokens", "flops"))
    yield f"{len(rows)} runs: {short(tokens)} tokens, {flops:.3g} FLOPs, {hours:,.3g} GPU hours one after another"
    if hours < alone:
        yield f"  separate runs would take {alone:,.3g} GPU hours: branching off saves {1 - hours / alone:.0%}"
    for gpu, source in sorted({(row.estimate.gpu, row.estimate.source.split(" MFU, ")[-1]) for row in rows}):
        yield f"  GPU hours on one {gpu}: {source}"
    yield from _memory(plan)
    rate, batch = study.rules.learning_rate, study.rules.batch
    yield f"rate: {rate}, {LEARNING_RATES[rate].source}; batch: {batch}, {BATCHES[batch].source}"
    if study.schedule.kind == "wsd_branches":
        yield "  at the geometric mean of the tokens of trunk and branches"
    yield "  / rule: by what the rule says of the run's own tokens"
    if study.rules.tune:
        yield "tune: the factor of the best run multiplies all other rates of its kind, whose runs wait for it"
    yield from _far(plan)
    if (times := _times_beyond(plan)) is not None:
        near = f": too near to test the law; hold out one of {FAR} times" if round(times, 1) < FAR else ""
        yield f"held out: {times:.1f} times the FLOPs of the largest run that is fitted{near}"
    yield from _data(plan)


def _memory(plan: Plan) -> Iterator[str]:
    """How many runs of one GPU it takes side by side: what `launch` refuses to exceed, of a GPU here."""
    at_once = side_by_side(row.memory for row in plan.rows if row.cell.gpus == 1)
    if at_once and not plan.study.limits.profile:
        fitting, room = sum(memory <= CLUSTER.memory for memory in at_once), f"{CLUSTER.memory / 2**30:.0f} GiB"
        which = "all runs" if fitting == len(at_once) else f"the {fitting} largest runs" if fitting else "no run"
        yield f"memory: {room}, which training may take of an 80 GB GPU, hold {which} side by side"


def _far(plan: Plan) -> Iterator[str]:
    """Models that are far from those that a rule comes from."""
    sizes = {row.cell.parameters_without_embedding for row in plan.rows}
    for name in dict.fromkeys([plan.study.rules.learning_rate, plan.study.rules.batch]):
        rule = LEARNING_RATES[name]
        if far := sorted(filter(rule.is_far, sizes)):
            here = " to ".join(dict.fromkeys([short(far[0]), short(far[-1])]))
            low, high = map(short, rule.sizes)
            yield f"  {name} is of models of {low} to {high} parameters without embeddings: a guess for {here}"


def _times_beyond(plan: Plan) -> float | None:
    """FLOPs of the held-out runs by those of the largest that is fitted, of the kind of which it is least; None where
    nothing is held out."""
    cells = [row.cell for row in plan.rows]
    largest = {(cell.kind, cell.held_out): cell.flops for cell in sorted(cells, key=lambda cell: cell.flops)}
    return min((largest[kind, True] / largest[kind, False] for kind, held in largest if held), default=None)


def _data(plan: Plan) -> Iterator[str]:
    """What is prepared, and whether it suffices."""
    config = plan.rows[0].cell.config
    lengths, length = sequence_lengths(config), config.train.seq_length
    counted = "are counted as one document each, since no data are at hand here"
    if lengths is not None:
        mean = sum(each * part for each, part in lengths.items())
        counted = f"see as much as in sequences of {mean:,.0f} on average, and are counted at the lengths of the data"
    yield f"FLOPs: samples of {length:,} tokens {counted}"
    identity = find_data(config)
    if identity is None:
        yield f"data: not prepared yet, run `megahybrid prepare {plan.study.base}`; identities are not known before"
        return
    yield f"data: {identity}"
    prepared = find_prepared(Path(str(config.data.path)).expanduser()) if config.data.path else None
    if prepared is not None:
        longest, there = max(row.cell.tokens for row in plan.rows), prepared.samples(TRAIN) * prepared.seq_length
        again = f": it reads them {longest / there:.2f} times" if longest > there else ""
        yield f"  the longest run takes {short(longest)} of the {short(there)} tokens that are prepared{again}"
        block, shortest = config.data.shuffle_block_size * length, min(row.cell.tokens for row in plan.rows)
        if block < there and shortest < BLOCKS * block:
            yield (
                f"  the shortest takes {short(shortest)}, and what is shuffled at once are {short(block)} from a shard "
                f"or two: set data.shuffle_block_size to all {prepared.samples(TRAIN):,} samples"
            )


def _precision(plan: Plan) -> str:
    """95 % intervals, half as wide each, relative."""
    study, kinds = plan.study, plan.precision
    targets = [f"{short(each.parameters)}, {short(each.tokens)}" for each in study.targets]
    names = [*targets, "held out"][: max(len(each.losses) for each in kinds.values())]  # but what is given up
    rows = [_widths(kind, f"{each.condition:.0e}", each.a_opt, each.losses) for kind, each in kinds.items()]
    for (first, one), (second, other) in itertools.combinations(kinds.items(), 2):
        losses = itertools.starmap(np.hypot, zip(one.losses, other.losses, strict=False))
        rows.append(_widths(f"{second} - {first}", "", np.hypot(one.a_opt, other.a_opt), losses))
    title = f"95 % intervals at {study.noise:.2%} noise: ±"
    head = (title, "condition", "a_opt", *names)
    return "\n".join([table(head, [(*row, *[""] * (len(head) - len(row))) for row in rows]), *_conditions(plan)])


def _conditions(plan: Plan) -> Iterator[str]:
    """What the condition numbers are of, and the kinds whose runs barely tell the law's terms apart."""
    yield (
        f"condition: with Chinchilla's law. `fit` has the law that the losses give, whose number may be far larger: it "
        f"warns\n  from {BARELY:.0e} on and refuses above {CONDITION_LIMIT:.0e}"
    )
    for kind, each in plan.precision.items():
        if each.condition > BARELY:
            number = f"{each.condition:.0e}"
            yield f"  the runs of {kind} barely tell the law's terms apart ({number}): spread sizes and budgets"


def _widths(name: str, condition: str, a_opt: float, losses: Iterable[float]) -> tuple[str, ...]:
    return name, condition, f"{a_opt:.3f}", *(f"{loss:.2%}" for loss in losses)
