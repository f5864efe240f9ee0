"""Why a start of the run has failed: logs/failures/START.txt, its newest copy logs/failure.txt, and status.json.

When one process fails, the others follow within seconds with errors of their own. The first to write decides: the file
of a start is made once. The file is the truth, status.json follows it.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import itertools
import os
import socket
import threading
import traceback
from dataclasses import dataclass

from megahybrid.errors import MachineFault, UserError
from megahybrid.files import write_text
from megahybrid.retry import may_succeed, retry
from megahybrid.training.ownership import NotOwner, another
from megahybrid.training.run_directory import RunDirectory

_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # on some file systems
_SECONDS_TO_WRITE = 10.0  # a process that fails is soon ended by others


@dataclass(frozen=True)
class Failure:
    """What a start's file says.

    Attributes:
        cause: one line.
        again: whether the same start may succeed when it is made again.
        step: the last finished one, where the process knew it.
        ours: whether the run was this start's: else it says nothing about the run.
        text: all of it.
    """

    cause: str
    again: bool
    step: int | None
    ours: bool
    text: str


def record(run: RunDirectory, error: BaseException, step: int | None = None, details: str = "") -> None:
    """Write why this process ends, unless another one of this start has; nothing where the disk does not take it.

    `step` is the last finished one, where status.json may know an older one; `details` stand in the place of the
    error's traceback.
    """
    text = _text(run, error, step, details)
    with contextlib.suppress(OSError, MachineFault):
        if retry(lambda: _create(run, text), "Recording the failure", seconds=_SECONDS_TO_WRITE):
            if not isinstance(error, NotOwner):  # which is no failure of this run
                retry(lambda: write_text(run.failure, text), f"Writing {run.failure}", seconds=_SECONDS_TO_WRITE)
        elif os.environ.get("RANK", "0") != "0":  # the main process may have written "running" since
            return
        tell(run)


def recorded(run: RunDirectory, error: BaseException, details: str = "") -> Failure:
    """`record` it; what the start's file says then, or would say where the disk does not take it."""
    record(run, error, details=details)
    return read(run) or _parse(_text(run, error, None, details))


def _text(run: RunDirectory, error: BaseException, step: int | None, details: str) -> str:
    if not details and not isinstance(error, UserError):
        details = "".join(traceback.format_exception(error))
    facts = {
        "when": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "where": f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}, process {os.getpid()}",
        "start": run.start,
        "again": "yes" if may_succeed(error) else "no",
        **({} if step is None else {"step": step}),
        **({"of": "another start"} if isinstance(error, NotOwner) else {}),
    }
    header = (f"{name:<6} {value}" for name, value in facts.items())
    return "\n".join([describe(error), "", *header, "", details]).rstrip() + "\n"


def _create(run: RunDirectory, text: str) -> bool:
    """Whether this process was the first; the file is whole from the moment at which it is there."""
    file = run.failure_of(run.start)
    part = file.with_name(f".{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_text(text, encoding="utf-8")
        os.link(part, file)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        with contextlib.suppress(FileExistsError), open(file, "x", encoding="utf-8") as whole:
            whole.write(text)
            return True
        return False
    finally:
        part.unlink(missing_ok=True)
    return True


def read(run: RunDirectory, start: str | None = None) -> Failure | None:
    """Why a start, this one by default, has failed; None where nobody has recorded it."""
    file = run.failure_of(start or run.start)
    try:
        text = retry(lambda: file.read_text(encoding="utf-8"), f"Reading {file}")
    except FileNotFoundError:
        return None
    return _parse(text)


def _parse(text: str) -> Failure:
    cause, _, *lines = text.splitlines()
    facts = dict(line.split(maxsplit=1) for line in itertools.takewhile(bool, lines))
    step = int(facts["step"]) if "step" in facts else None
    return Failure(cause, facts["again"] == "yes", step, "of" not in facts, text)


def tell(run: RunDirectory) -> None:
    """Have status.json say what this start's file says, unless the run is another one's. Raises OSError."""
    failure = read(run)
    if failure is not None and failure.ours and another(run) is None:
        run.end_status("failed", failure.cause, failure.again, failure.step)


def forget(run: RunDirectory) -> None:
    """Remove this start's file."""
    run.failure_of(run.start).unlink(missing_ok=True)


def is_refusal(error: BaseException) -> bool:
    """Whether it says what is wrong with a start by hand: told on the terminal, it changes nothing of the run."""
    return isinstance(error, UserError) and not may_succeed(error) and "MEGAHYBRID_SUBMISSION" not in os.environ


def describe(error: BaseException) -> str:
    """One line about an error: a UserError's own sentence, else its type and first line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, UserError):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
