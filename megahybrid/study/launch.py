"""`megahybrid study launch`: begins what is missing, here or through Slurm; the same command goes on."""

from __future__ import annotations

import contextlib
import fcntl
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path

from megahybrid.config import Config, load_config
from megahybrid.devices import gpu_memory, visible_gpus
from megahybrid.errors import UserError
from megahybrid.launch import runs, slurm
from megahybrid.launch.profile import load_profile
from megahybrid.launch.submit import Request, job_of, submit
from megahybrid.scaling.memory import peak_bytes
from megahybrid.study import prediction
from megahybrid.study.cells import Cell
from megahybrid.study.expected import expect
from megahybrid.study.file import Study
from megahybrid.study.identity import find_data
from megahybrid.study.law.fit import NoLaw
from megahybrid.study.local import Processes
from megahybrid.study.models import side_by_side, tabled_estimate
from megahybrid.study.outcomes import Survey, has_branch_point, trunk_of
from megahybrid.study.results import read_plan
from megahybrid.study.status import Overall, StatusLine, hours_taken
from megahybrid.training.run_directory import RunDirectory

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_LOOKS_AT_THE_QUEUE = 30.0


def launch(study: Study, file: str, jobs: int | None, wait: bool, say: Callable[[str], None]) -> int:
    """Begin what is missing and can begin; returns 1 where a run has failed, or where what is held out does not begin,
    since nothing can be predicted of it, else 0. Raises UserError, also for a design that cannot tell the law's terms
    apart.

    Args:
        study, file: limits.profile says through which cluster; the study's file, which is noted.
        jobs: so many at once as processes of this machine instead, until all is done; 1 where there is no profile.
        wait: go on through Slurm, too, until all is done.
        say: is told what happens.
    """
    folder = study.folder
    if _text(folder / "study.yaml") != _text(Path(file)):
        raise UserError(f"'{file}' is not planned as it is now; run `megahybrid study plan {file}` first.")
    with _alone(folder):
        if jobs is None and study.limits.profile is not None:
            launching = Launching(study, file, say, slurm.jobs)
            launching.check_design()
            launching.through_slurm(wait)
        else:
            queue = runs.queued_jobs(say)
            launching = Launching(study, file, say, lambda: queue)
            launching.check_memory(jobs or 1)
            launching.check_design()
            launching.here(jobs or 1)
        return launching.conclude()


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One launch of a study at a time."""
    with open(folder / "launch.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"'{folder}' is being launched already; wait for it, or end it first.") from error
        yield


class Launching:
    """One launch of a study, which begins a run once at most.

    Attributes:
        outcomes: as they were when they were last looked at.
    """

    def __init__(
        self,
        study: Study,
        file: str,
        say: Callable[[str], None],
        queue: Callable[[], Sequence[slurm.QueuedJob] | None],
    ):
        self.study, self.file, self.folder = study, file, study.folder
        self._line, self._queue, self._survey = StatusLine(say), queue, Survey(study)
        self._hours: dict[tuple[str, int | None], float] = {}
        self._begun: set[str] = set()
        self._said: set[str] = set()
        self._unpredictable: UserError | None = None
        self._look()
        plan = self.folder / "plan.csv"
        if plan.is_file() and read_plan(plan)[1] != (find_data(self.outcomes[0].cell.config) or ""):
            raise UserError(
                f"The data are others than when '{file}' was planned, and so are its runs; run `megahybrid study plan "
                f"{file}` again."
            )

    def check_design(self) -> None:
        """Raises UserError where nothing may begin: the law's terms could not be told apart, or it would take too
        long."""
        expect(self.study, [each.cell for each in self.outcomes if not each.cell.retry_of])
        if fault := self._over_the_limit({each.cell.identity for each in self.outcomes if not each.ended}):
            raise UserError(f"Nothing begins: {fault}")

    def here(self, jobs: int) -> None:
        """Processes of this machine, `jobs` at once over its GPUs, until nothing more can begin."""
        began, before = time.monotonic(), self._overall().done
        with Processes(self.folder, jobs) as processes:
            try:
                while True:
                    # Also those that another launch has left running.
                    running = {each.run.path for each in self.outcomes if each.state == "running"} | processes.running
                    for cell in self._affordable(self._ready())[: max(0, jobs - len(running))]:
                        processes.start(with_all_milestones(cell.config), self.file, running)
                        self._note(cell, "begins")
                    if not running and not processes.running:
                        return
                    ended = processes.wait(_SECONDS_BETWEEN_LOOKS)
                    self._look()
                    self._tell_of(ended)
                    overall = self._overall()
                    self._line.show(f"{overall}; {overall.left(before, time.monotonic() - began)} left")
            except KeyboardInterrupt:
                self._line.say("The runs save and stop; interrupted once more, they are killed.")
                raise

    def check_memory(self, jobs: int) -> None:
        """Raises UserError where so many runs at once would not fit into this machine's GPUs."""
        needs: dict[tuple[str, str, int], list[float]] = defaultdict(list)
        for cell in (each.cell for each in self.outcomes if not each.ended):
            step = needs[cell.kind, cell.size, cell.config.train.global_batch_size]
            step.append(step[0] if step else max(peak_bytes(cell.config, 1)))
        gpus, room = max(1, len(visible_gpus())), gpu_memory()
        at_once = side_by_side(memory for step in needs.values() for memory in step)[: math.ceil(jobs / gpus)]
        if at_once and at_once[-1] > room:
            fitting = sum(memory <= room for memory in at_once)
            less = f"give --jobs {fitting * gpus}" if fitting else "give the larger ones to another machine"
            raise UserError(
                f"The {len(at_once)} largest runs take {at_once[-1] / 2**30:.1f} GiB side by side, and a GPU here has "
                f"{room / 2**30:.1f}; {less}."
            )

    def through_slurm(self, wait: bool) -> None:
        """Job arrays; with `wait` until nothing runs, waits or can begin any more."""
        while True:
            begun = len(self._begun)
            self._submit(self._affordable(self._ready()))
            self._submit(self._affordable(self._branches()))
            going_on = len(self._begun) > begun or any(each.state in ("running", "waiting") for each in self.outcomes)
            if not wait or not going_on:
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS_AT_THE_QUEUE)
            try:
                self._look()
            except UserError as error:  # squeue may answer next time
                self._say_once(str(error))

    def conclude(self) -> int:
        """Say what has come of it; 1 where a run has failed or no launch gets further, else 0."""
        self._look()
        failed = [each for each in self.outcomes if each.state == "failed" and not each.given_up]
        for each in failed:
            why = each.why.rstrip(".") or "it ended without a word"
            self._line.say(f"{each.cell.name} has failed: {why}; see {each.run.path / 'logs'}.")
        if late := prediction.too_late(self.folder, self.outcomes):
            self._line.say(
                f"Nothing is predicted of {', '.join(late)}: begun before, so that no prediction would test it."
            )
        if failed and any(each.cell.held_out and not each.ended for each in self.outcomes):
            self._line.say(
                "What is held out waits: nothing is predicted from a part of the runs. Name those under give_up in "
                "the study's file that have failed for good."
            )
        elif isinstance(self._unpredictable, NoLaw):
            self._line.say(
                f"The same command changes nothing: mend '{self.file}' (more sizes or budgets), and give `megahybrid "
                f"study plan {self.file}` and this command again; what is done stays done."
            )
        elif self._unpredictable:
            self._line.say("Once that is mended, the same command goes on.")
        elif not all(each.ended for each in self.outcomes):
            self._line.say("The same command goes on with what waits for these.")
        self._line.say(str(self._overall()))
        return 1 if failed or self._unpredictable else 0

    def _look(self) -> None:
        self.outcomes = self._survey.look(self._queue())

    def _overall(self) -> Overall:
        return Overall.of(self.outcomes, self.study.limits.gpu_hours)

    def _note(self, cell: Cell, what: str) -> None:
        self._begun.add(cell.identity)
        self._line.say(f"{cell.name} {what} ({Path(cell.config.run.dir).name}).")

    def _tell_of(self, ended: Sequence[Path]) -> None:
        """Of each run whose process has ended what has become of it."""
        for each in self.outcomes:
            if each.run.path in ended:
                loss = f", loss {each.loss:.4f}" if each.state == "done" else ""
                why = f": {each.why}" if each.why else "" if loss else f"; see {each.run.path / 'logs'}"
                self._line.say(f"{each.cell.name} is {each.state}{loss}{why}")

    def _startable(self) -> list[Cell]:
        """Each run once that nobody has begun and that knows its learning rate, the longest first, those that are held
        out last, and once what is predicted of them is written down."""
        found: dict[str, Cell] = {}
        for each in self.outcomes:
            begun = each.ended or each.state in ("running", "waiting") or each.cell.identity in self._begun
            if not begun and not each.cell.awaits and not (each.cell.held_out and not self._frozen()):
                found.setdefault(each.cell.identity, each.cell)
        return sorted(found.values(), key=lambda cell: (cell.held_out, -self._expected(cell) / cell.gpus))

    def _ready(self) -> list[Cell]:
        """Those that can begin now."""
        return [cell for cell in self._startable() if cell.role != "branch" or has_branch_point(cell)]

    def _branches(self) -> list[Cell]:
        """Those that can begin after the job of their trunk, which is in the queue."""
        queued = {each.cell.identity for each in self.outcomes if each.state in ("running", "waiting")} | self._begun
        waiting = [cell for cell in self._startable() if cell.role == "branch" and cell.trunk in queued]
        return [cell for cell in waiting if not has_branch_point(cell) and job_of(trunk_of(cell).path)]

    def _frozen(self) -> bool:
        """Whether what is held out may begin; writes prediction.json when all the other runs have ended. Raises
        UserError where that cannot be read."""
        if prediction.is_frozen(self.folder, self.outcomes):
            return True
        if self._unpredictable or not all(each.ended for each in self.outcomes if not each.cell.held_out):
            return False
        try:
            prediction.freeze(self.study, self.outcomes)
        except UserError as error:
            self._unpredictable = error
            self._line.say(f"What is held out waits: {error}")
            return False
        self._line.say(f"What is predicted of the runs that are held out stands in {self.folder / 'prediction.json'}.")
        return True

    def _affordable(self, cells: Sequence[Cell]) -> Sequence[Cell]:
        """These, or none where they would take more than limits.gpu_hours allows."""
        if fault := self._over_the_limit({cell.identity for cell in cells}):
            self._say_once(f"Nothing more begins: {fault}")
            return []
        return cells

    def _over_the_limit(self, wanted: Set[str]) -> str | None:
        """A sentence where what has been taken and the rest of these runs, and of those in progress, exceed
        limits.gpu_hours."""
        limit = self.study.limits.gpu_hours
        if limit is None or not wanted:
            return None
        rest = {
            each.cell.identity: self._expected(each.cell) * (1 - each.flops_done / each.flops)
            for each in self.outcomes
            if each.cell.identity in wanted or each.state in ("running", "waiting")
        }
        taken, more = hours_taken(self.outcomes), sum(rest.values())
        if taken + more <= limit:
            return None
        return (
            f"the study has taken {taken:.3g} GPU hours and its runs would take {more:.3g} more, which is over "
            f"limits.gpu_hours = {limit:g}; raise it, or make the study smaller."
        )

    def _expected(self, cell: Cell) -> float:
        """GPU hours of a run."""
        run = cell.identity, cell.branch_step  # a branch may have to begin earlier
        if run not in self._hours:
            self._hours[run] = tabled_estimate(cell.config).hours
        return self._hours[run]

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._line.say(text)

    def _submit(self, cells: Sequence[Cell]) -> None:
        """One job array for the runs of as many nodes and as long a time that wait for the same job, or for none."""
        profile, classes = load_profile(self.study.limits.profile), defaultdict(list)
        for cell in cells:
            waits = cell.role == "branch" and not has_branch_point(cell)
            after = job_of(trunk_of(cell).path) if waits else None
            limit = time_limit(self._expected(cell) / cell.gpus, profile.time)
            classes[cell.nodes, limit, after].append(cell)
        for (nodes, limit, after), members in classes.items():
            configs = [with_all_milestones(cell.config) for cell in members]
            request = Request(
                configs, replace(profile, time=limit), self.file, nodes=nodes, folder=self.folder, after=after
            )
            (number,) = submit(request).numbers
            for cell in members:
                self._note(cell, f"is in the queue, job {number}" + (f" after {after}" if after else ""))


def with_all_milestones(config: Config) -> Config:
    """Those included for which another study has begun the same run: its branches may be still to come."""
    before = RunDirectory(config.run.dir).config
    theirs = load_config(before).checkpoint.milestones if before.is_file() else []
    milestones = sorted({*config.checkpoint.milestones, *theirs})
    return replace(config, checkpoint=replace(config.checkpoint, milestones=milestones))


def time_limit(hours: float, most: str) -> str:
    """A job's limit: the first of 1, 2, 4, … hours that leaves half as much again as is expected, at most `most`, the
    profile's, as sbatch takes it. A run that needs more requeues."""
    whole = next((2**n for n in range(10) if 2**n >= 1.5 * hours), math.inf)
    return f"{whole}:00:00" if whole < _hours(most) else most


def _hours(limit: str) -> float:
    """Of M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; infinity for anything else."""
    days, dash, rest = limit.rpartition("-")
    try:
        numbers = [float(each) for each in rest.split(":")]
        if dash:
            hours, minutes, seconds = (*numbers, 0.0, 0.0)[:3]
        else:
            hours, minutes, seconds = numbers if len(numbers) == 3 else (0.0, *numbers, 0.0)[:3]
        return 24 * float(days or 0) + hours + minutes / 60 + seconds / 3600
    except ValueError:
        return math.inf
