"""What has become of a study's cells: read from their run directories and from Slurm's queue, where it is here."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megahybrid.errors import UserError
from megahybrid.launch import runs, slurm
from megahybrid.study.cells import RETRY, Cell
from megahybrid.study.design import design
from megahybrid.study.file import Study
from megahybrid.study.identity import find_data, identify
from megahybrid.study.measured import gpu_hours
from megahybrid.study.models import Counts
from megahybrid.study.table import Row, Run, read_rows, read_runs
from megahybrid.training import checkpoint_folder, ownership
from megahybrid.training.metrics_file import first_line, lines_backwards
from megahybrid.training.run_directory import RunDirectory

_KEPT = (
    *("cell", "run", "kind", "parameters", "tokens", "learning_rate", "loss", "state"),
    *("excluded", "gpu_hours", "code_version", "began"),
)
"""Columns of runs.csv that say of a run what its directory would."""

_STATES = {"queued": "waiting", "requeued": "waiting", "submitted": "waiting", "stalled": "running"}


@dataclass(frozen=True)
class Outcome:
    """A cell and its run.

    Attributes:
        cell: what was asked for.
        run: what its directory says.
        state: done, running, waiting (in Slurm's queue), missing, diverged or failed.
        why: if there is a why.
        loss: the final validation's, of a run that is done or has diverged at its end.
        given_up: whether it has failed for good.
        collected: of a run that is done and whose directory has been removed since, what runs.csv says of it.
    """

    cell: Cell
    run: runs.Run
    state: str
    why: str
    loss: float | None
    given_up: bool = False
    collected: Run | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it by itself or by launching it again."""
        return self.state in ("done", "diverged") or self.given_up

    @property
    def flops(self) -> float:
        """That its own run trains with: of a branch without its trunk's."""
        return self.cell.flops * (1 - (self.cell.branch_step or 0) / self.cell.config.train.steps)

    @property
    def flops_done(self) -> float:
        """So far, of `flops`."""
        if self.collected:
            return self.flops
        first, steps = self.cell.branch_step or 0, self.cell.config.train.steps
        return self.flops * (self.run.last.get("step", first) - first) / (steps - first)


class Survey:
    """Looks at what has become of a study's cells, those included that try diverged ones again at half the rate.

    A run whose directory has been removed since it was collected stays done: runs.csv has its row. Raises UserError,
    when it looks, where runs.csv cannot be read or says something else of the run.
    """

    def __init__(self, study: Study):
        self._study = study
        self._tuned: dict[str, float] = {}
        self._cells = _design(study)

    def look(self, queue: Sequence[slurm.QueuedJob] | None) -> list[Outcome]:
        """Every cell's outcome now, the retries last; `queue` is None where Slurm cannot be asked."""
        outcomes = self._observe(queue)
        tuned = _best_factors(self._study, outcomes)
        if tuned != self._tuned:
            self._tuned, self._cells = tuned, design(self._study, tuned)
            outcomes = self._observe(queue)
        return outcomes

    @functools.cached_property
    def _collected(self) -> dict[str, Run]:
        """Rows of runs.csv, as it is when a run is first missed, of runs that are done, by identity."""
        file = self._study.folder / "runs.csv"
        if not file.is_file():
            return {}
        try:
            rows = read_runs(file, {name: name for name in _KEPT})
        except UserError as error:
            raise UserError(f"{error} Remove the file where no run's directory has been removed.") from None
        return {row.run: row for row in rows if row.state == "done"}

    def _observe(self, queue: Sequence[slurm.QueuedJob] | None) -> list[Outcome]:
        outcomes = _with_trunks(self._outcome(cell, queue) for cell in self._cells)
        return _with_trunks([*outcomes, *(self._outcome(cell, queue) for cell in _retries(outcomes))])

    def _outcome(self, cell: Cell, queue: Sequence[slurm.QueuedJob] | None) -> Outcome:
        found = _outcome(cell, queue)
        if (found.state, found.why) == ("missing", "") and (row := self._collected.get(cell.identity)):
            _check_row(self._study.folder, row, cell)
            return replace(found, state="done", loss=row.loss, collected=row)
        if cell.name not in self._study.give_up or found.state not in ("missing", "failed"):
            return found
        return replace(found, state="failed", why=f"given up{found.why and f': {found.why}'}", given_up=True)


def _design(study: Study) -> list[Cell]:
    """Its cells, whose models are those of plan.csv where all its runs are theirs: to count parameters takes seconds,
    mostly for torch and Megatron to load, and an identity holds all that a count depends on."""
    if study.rules.tune or study.match == "parameters":  # cells that wait, and models that follow another's count
        return design(study)
    try:
        rows = read_rows(study.folder / "plan.csv")
        known = {(row["kind"], row["size"]): _counts(row) for row in rows}
        cells = design(study, known=known)
    except (UserError, KeyError, ValueError):
        return design(study)
    planned = {cell.identity for cell in cells if cell.name not in study.give_up} == {row["run"] for row in rows}
    return cells if planned else design(study)


def _counts(row: Row) -> Counts:
    return Counts(int(row["parameters"]), int(row["parameters_without_embedding"]), float(row["flops_per_token"]))


def hours_by_run(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """GPU hours so far by identity, measured, or of runs whose directory is gone as they were collected."""
    gone = {each.cell.identity: each.collected.gpu_hours for each in outcomes if each.collected}
    return gpu_hours() | {run: hours for run, hours in gone.items() if math.isfinite(hours)}


def _check_row(folder: Path, row: Run, cell: Cell) -> None:
    """Raises UserError for a row that is not of the cell's run, whatever its identity says."""
    for name in ("kind", "parameters", "tokens", "learning_rate"):
        own = cell.config.optimizer.learning_rate if name == "learning_rate" else getattr(cell, name)
        if getattr(row, name) != own:
            raise UserError(
                f"'{folder / 'runs.csv'}' has {name} = {getattr(row, name)} for {cell.name}, whose directory is gone "
                f"and which has {own}; that is not what `megahybrid study collect` wrote: mend it, or remove the row."
            )


def has_branch_point(cell: Cell) -> bool:
    """Whether the checkpoint of its trunk from which a branch starts is there, if it needs one."""
    if cell.branch_step is None:
        return True
    step = checkpoint_folder.name(cell.branch_step)
    return (trunk_of(cell).checkpoints / step / "checkpoint.json").is_file()


def trunk_of(cell: Cell) -> RunDirectory:
    """The run directory of its trunk, or its own."""
    return RunDirectory(Path(cell.config.run.dir).with_name(cell.trunk))


def _best_factors(study: Study, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """By kind, the factor on the learning rate with the smallest loss, of grids that have ended."""
    best = {}
    for kind in study.kinds:
        grid = [each for each in outcomes if each.cell.kind == kind and each.cell.role == "tune"]
        if grid and all(each.ended for each in grid):
            losses = [each.loss if each.state == "done" else math.inf for each in grid]
            best[kind] = min(zip(losses, study.rules.tune.factors, strict=True))[1]
    return best


def _with_trunks(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Branches that have not begun wait for their trunk; where it has diverged before, so have they, and where it is
    done without their checkpoint, they begin earlier."""
    outcomes = list(outcomes)
    trunks = {each.cell.identity: each for each in outcomes}
    for number, each in enumerate(outcomes):
        if each.cell.role != "branch" or each.cell.awaits or each.collected or has_branch_point(each.cell):
            continue
        trunk, step = trunks[each.cell.trunk], each.cell.branch_step
        ended = f"its trunk {trunk.cell.name} has ended without step {step}"
        waits = each.state in ("missing", "failed") and not each.given_up
        if trunk.ended and trunk.state != "diverged":
            outcomes[number] = replace(each, cell=_from_earlier(each.cell), why=each.why or (ended if waits else ""))
        elif waits:  # also where its job ended with its trunk's
            state, why = (
                ("diverged", ended) if trunk.ended else ("missing", f"waits for step {step} of {trunk.cell.name}")
            )
            outcomes[number] = replace(each, state=state, why=why)
    return outcomes


def _from_earlier(branch: Cell) -> Cell:
    """A branch that begins with the newest checkpoint that its trunk still has from before its own, or from scratch: a
    longer way to the same run bit for bit, whose identity and trunk stay what they are."""
    trunk = trunk_of(branch)
    steps = [checkpoint_folder.step_of(each) for each in checkpoint_folder.whole(trunk.checkpoints)]
    step = max((each for each in steps if each < branch.branch_step), default=None)
    train = replace(branch.config.train, branch_from=f"{trunk.path}@{step}" if step else None)
    return replace(branch, config=replace(branch.config, train=train), branch_step=step)


def _retries(outcomes: Sequence[Outcome]) -> list[Cell]:
    """The cells that are tried once in the place of diverged ones: at half the rate, otherwise the same.

    With a trunk the branches that it cannot start any more go over to the trunk that is tried instead. A tuning
    grid's diverged runs have said what was asked.
    """
    again: dict[str, Cell] = {}
    for each in sorted(outcomes, key=lambda each: each.cell.role == "branch"):
        if each.state == "diverged" and each.cell.role != "tune":
            again[each.cell.identity] = _at_half_the_rate(each.cell, again.get(each.cell.trunk))
    return list(again.values())


def _at_half_the_rate(cell: Cell, trunk: Cell | None) -> Cell:
    """The cell's second try; of a branch that of its trunk's second try, or, where the trunk is sound, a run from
    scratch: a branch at another rate than its trunk's would be no run of that length at any rate."""
    config, step = cell.config, cell.branch_step if trunk else None
    config = replace(
        config,
        train=replace(config.train, branch_from=f"{trunk.config.run.dir}@{step}" if trunk else None),
        optimizer=replace(config.optimizer, learning_rate=config.optimizer.learning_rate / 2),
    )
    identity, name = identify(config, find_data(config)), cell.name + RETRY
    config = replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir).with_name(identity))),
        tracking=replace(config.tracking, name=name),
    )
    return replace(
        cell,
        name=name,
        config=config,
        identity=identity,
        role="single" if cell.role == "branch" and trunk is None else cell.role,
        trunk=trunk.identity if trunk else identity,
        branch_step=step,
        retry_of=cell.identity,
    )


def _outcome(cell: Cell, queue: Sequence[slurm.QueuedJob] | None) -> Outcome:
    run = runs.read(Path(cell.config.run.dir), queue)
    if cell.awaits:  # which run it is, is not known yet
        return Outcome(cell, replace(run, last={}, jobs=()), "missing", "waits for its learning rate to be tuned", None)
    state, why = _state(run, queue is None)
    loss = run.last.get("validation_loss") if state == "done" else None
    if state == "done" and loss is None:
        state, why = "failed", f"{run.path / 'metrics.jsonl'} has no final validation loss"
    elif state in ("done", "failed") and (fault := _divergence(cell, run, loss)):
        state, why = "diverged", fault
    return Outcome(cell, run, state, why, loss)


def _state(run: runs.Run, by_files: bool) -> tuple[str, str]:
    """`by_files`: whether Slurm cannot be asked."""
    files = RunDirectory(run.path)
    if run.state != "done" and ownership.another(files):  # what status.json says may be of the start before
        return "running", run.reason if run.state == "stalled" else ""
    if not run.jobs and not files.status.exists():
        return "missing", ""
    if run.state == "stopped":
        return "missing", f"{run.reason} stopped it at step {run.step} of {run.target}"
    if run.state == "stalled" and by_files:  # nobody owns it any more: a start takes it over
        return "missing", run.reason
    return _STATES.get(run.state, run.state), run.reason


def _divergence(cell: Cell, run: runs.Run, loss: float | None) -> str | None:
    """What shows that a run that has ended has diverged, None where nothing does."""
    if loss is None:
        most = cell.config.train.skip.most_in_a_row
        return f"more than {most} steps in a row were left out" if _left_out(run.path, most) == most else None
    if not math.isfinite(loss):
        return f"its final loss is {loss}"
    first = _first_loss(trunk_of(cell))
    return f"its final loss, {loss:.4f}, is above its first, {first:.4f}" if loss > first else None


def _first_loss(run: RunDirectory) -> float:
    with contextlib.suppress(OSError):
        return first_line(run.metrics).get("loss", math.inf)
    return math.inf


def _left_out(run: Path, most: int) -> int:
    """Steps left out in a row at its end, of which metrics.jsonl has no more than `most`: the next ends the run."""
    try:
        counts = [line["skipped"] for line in itertools.islice(lines_backwards(run / "metrics.jsonl"), most + 1)]
    except OSError:
        return 0
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] > pair[1], itertools.pairwise([*counts, 0])))
