"""The evaluation of a model: tasks × lengths × depths, a line a sample, going on where an earlier start ended."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from megahybrid.errors import UserError
from megahybrid.evaluation import costs, modes, report
from megahybrid.evaluation.lines import Folder, Key, key_of
from megahybrid.evaluation.progress import Progress
from megahybrid.evaluation.results import Entry, Line, short
from megahybrid.evaluation.subject import Subject
from megahybrid.evaluation.tasks import Chosen
from megahybrid.inference.batch import suitable_chunk
from megahybrid.model.mixer import swapped
from megahybrid.parallel import groups
from megahybrid.tasks import Answer, Sample, Vocabulary
from megahybrid.training import checkpoint_folder

_MOST_TOKENS = 2**20  # in work at once, where nothing else is asked for
_PATIENCE = 60.0  # seconds in which the others come as far as a process that has no memory left


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    Attributes:
        tasks, lengths, policies: every combination of them, the lengths ascending.
        depths: places of a needle that can be put somewhere.
        samples: of each combination and depth.
        mode: forced or generate.
        batch_size, prefill_chunk: samples in work at once, tokens read in a step; None for what suits.
    """

    tasks: tuple[Chosen, ...]
    lengths: tuple[int, ...]
    depths: int
    samples: int
    mode: str
    policies: tuple[str, ...]
    batch_size: int | None = None
    prefill_chunk: int | None = None

    def check(self, vocabulary: Vocabulary) -> None:
        """Raise UserError for a sample that cannot be made of these tokens."""
        for chosen in self.tasks:
            for length in self.lengths:
                chosen.task.check(chosen.parameters, length, vocabulary)


class _Cell(NamedTuple):
    """Samples that share all but their number; `missing` are those without a line."""

    chosen: Chosen
    policy: str
    length: int
    depth: float | None
    missing: list[int]


def evaluate(subject: Subject, plan: Plan, path: Path | None = None) -> None:
    """Do what of the plan has no line yet, and write and print what all lines say; called by every process.

    `path`: the folder, one beside the model when left out. Raises UserError before anything is written for what cannot
    be asked, or where the folder holds lines of other settings; and for a length that memory does not allow. What is
    done is reported after each length, and whatever ends it.
    """
    plan.check(subject.vocabulary)
    modes.check(subject.config, plan.policies)
    folder = Folder(path or subject.home / "evaluations" / checkpoint_folder.name(subject.step))
    groups.on_main(lambda: folder.open(subject.settings, {each.name: each.settings for each in plan.tasks}))
    done = groups.broadcast({each.name: set(map(key_of, folder.read(each.name))) for each in plan.tasks})
    known, here = groups.broadcast((report.known_costs(folder), report.device()))
    cells = list(_cells(plan, done))
    progress = Progress(sum(each.length * len(each.missing) for each in cells), groups.is_main())
    try:
        for length in plan.lengths:
            for cell in cells:
                if cell.length == length:
                    _do(subject, plan, cell, folder, progress)
            if (length, here) not in {(each["length"], each["device"]) for each in known}:
                known.append({**_cost(subject, plan, length), "device": here})
            groups.on_main(lambda: report.write(folder, subject, known))
    except MemoryError:
        stays = f": what is done stays, in '{folder.path}'" if progress.done or any(done.values()) else ""
        raise UserError(
            f"Samples of {short(length)} tokens do not fit into memory; lower --batch-size or --prefill-chunk, or "
            f"leave out lengths from there on{stays}."
        ) from None
    finally:  # also where it is interrupted
        progress.close()
        if groups.is_main():
            report.show(folder, subject, known, news=progress.done > 0)


def _cost(subject: Subject, plan: Plan, length: int) -> Entry:
    """Of one sequence of about this length."""
    tokens = plan.tasks[0].sample(length, subject.vocabulary, None, 0).tokens
    with _memory_for_all():
        found = costs.measure(subject.model, tokens.tolist(), _chunk(subject, plan))
    return {**found, "length": length}


def _cells(plan: Plan, done: dict[str, set[Key]]) -> Iterator[_Cell]:
    for chosen in plan.tasks:
        depths = _depths(plan.depths) if chosen.task.has_depth else [None]
        for length in plan.lengths:
            for policy in plan.policies:
                for depth in depths:
                    keys = [(plan.mode, policy, length, depth, index) for index in range(plan.samples)]
                    yield _Cell(
                        *(chosen, policy, length, depth),
                        [key[-1] for key in keys if key not in done[chosen.name]],
                    )


def _depths(count: int) -> list[float]:
    """From the first place to the last; a single one in the middle."""
    return [round(number / (count - 1), 4) for number in range(count)] if count > 1 else [0.5]


def _do(subject: Subject, plan: Plan, cell: _Cell, folder: Folder, progress: Progress) -> None:
    """Samples in groups that do not depend on which of them have lines."""
    size = plan.batch_size or max(1, min(16, _MOST_TOKENS // cell.length))
    for first in range(0, plan.samples, size):
        missing = [index for index in cell.missing if first <= index < first + size]
        if not missing:
            continue
        costs.require_memory(subject.model, len(missing), cell.length)
        samples = [cell.chosen.sample(cell.length, subject.vocabulary, cell.depth, index) for index in missing]
        wanted, numbers = map(_needles, samples), map(_number, samples)
        with _memory_for_all(), swapped(subject.model, cell.policy, list(wanted), list(numbers)):
            outcomes = modes.MODES[plan.mode](subject, cell.chosen.task, samples, _chunk(subject, plan))
        lines = [
            _line(subject, plan.mode, cell, index, sample, outcome)
            for index, sample, outcome in zip(missing, samples, outcomes, strict=True)
        ]
        groups.on_main(partial(folder.add, cell.chosen.name, lines))
        progress.add(cell.length * len(missing), f"{cell.chosen.name} at {short(cell.length)}, {cell.policy}")


def _needles(sample: Sample) -> list[int]:
    """The tokens that will be asked for."""
    return sorted({token for answer in sample.answers for needle in answer.needles for token in range(*needle)})


def _number(sample: Sample) -> int:
    """Of 32 bits, another for every sample."""
    return zlib.crc32(sample.tokens.tobytes())


def _line(subject: Subject, mode: str, cell: _Cell, index: int, sample: Sample, outcome: modes.Outcome) -> Line:
    where = [_where(answer, subject.window) for answer in sample.answers]
    distances, places, near = map(list, zip(*where, strict=True))
    return {
        "mode": mode,
        "policy": cell.policy,
        "length": cell.length,
        "depth": cell.depth,
        "index": index,
        **sample.facts,
        "real_length": len(sample.tokens),
        "distance": distances,
        "place": places,
        "in_window": near,
        **outcome._asdict(),
    }


def _where(answer: Answer, window: int) -> tuple[int | None, float | None, int | None]:
    """Tokens from the nearest needle to an answer, where in the context before it that is, from 0 to 1, and whether it
    is inside the window; nothing where no needle holds it."""
    apart = answer.distance
    if math.isnan(apart):
        return None, None, None
    return int(apart), round(1 - apart / answer.span.begin, 4), int(apart <= window)


def _chunk(subject: Subject, plan: Plan) -> int:
    return plan.prefill_chunk or suitable_chunk(subject.model)


@contextlib.contextmanager
def _memory_for_all() -> Iterator[None]:
    """Raise MemoryError on all processes where it does not suffice for some: none waits for one that has given up. One
    for which others wait in the middle of a pass ends alone, and torchrun ends the others.
    """
    short_of_it = False
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        short_of_it = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not short_of_it:
            raise
    if groups.some(short_of_it, _PATIENCE if short_of_it else None):
        raise MemoryError
