"""One owner a run directory: a second start is refused at once, and one that has lost its run writes nothing more.

`owner.json` names the start that trains the run. It is made by whoever creates it first, touched every few seconds and
removed at the end. What a killed start has left is taken over: at once where it is known to have ended (its process
was on this host, or Slurm started this job after it), else when it has not been touched for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from megahybrid.errors import UserError
from megahybrid.files import read_json
from megahybrid.retry import retry
from megahybrid.training.run_directory import RunDirectory

_SECONDS_BETWEEN_TOUCHES = 10.0
_SILENT_SECONDS = 60.0  # without a touch for so long, an owner on another host is taken for dead
_SECONDS_TO_BE_WRITTEN = 5.0  # a file that is created and still empty
_SECONDS_TO_BE_SEEN = 75.0  # by another node: NFS clients remember for up to a minute what was not there


_token: str | None = None  # of the start that this process belongs to, once it has the run


class NotOwner(UserError):
    """The run directory belongs to another start."""


class Owner:
    """This start's hold on a run directory, while it is entered; entering it is collective, the main process holds it.

    Entering raises NotOwner, on every process, which names the other start where the run has an owner, and UserError,
    which names the nodes, where the run directory is not the same folder on all of them.
    """

    def __init__(self, run: RunDirectory):
        self._file, self._run = run.owner, run
        self._facts = _this_process() | {"token": secrets.token_hex(8)}
        self._left, self._thread = threading.Event(), threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> Owner:
        global _token
        groups = _groups()
        groups.on_main(self._take)
        _token = groups.broadcast(self._facts["token"])
        try:
            self._require_one_folder()
        except UserError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        if _groups().is_main():
            self._thread.join()
            with contextlib.suppress(OSError):
                if self._is_mine(_read(self._file)):
                    self._file.unlink()
                    self._run.path.rmdir()  # where nothing else was written

    def _require_one_folder(self) -> None:
        """One process of each node looks for what the main process has written."""
        host, groups = socket.gethostname(), _groups()
        blind = groups.local_rank() == 0 and not self._is_seen()
        hosts = groups.gather((host, blind))
        if names := sorted({name for name, blind in hosts if blind}):
            raise UserError(
                f"run.dir '{self._run.path}' is not the same folder on {', '.join(names)} as on {hosts[0][0]}; "
                "give one on a disk that all nodes share."
            )

    def _is_seen(self) -> bool:
        deadline = time.monotonic() + _SECONDS_TO_BE_SEEN
        while True:
            if (read_json(self._file) or {}).get("token") == _token:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)

    @property
    def token(self) -> str:
        """A name of this start that no other one has, the same on every process."""
        return _token

    def check(self) -> None:
        """Before anything is replaced or removed: raise NotOwner, on every process, where another start has the run."""
        _groups().on_main(lambda: retry(self.check_here, f"Reading {self._file}"))

    def check_here(self) -> None:
        """The same on the main process alone, for what it writes by itself. Raises OSError where it cannot tell."""
        theirs = _read(self._file)
        if self._is_mine(theirs) or (theirs is None and self._create()):
            return
        raise NotOwner(
            f"{self._run.path} belongs to {_name(theirs or {})} by now, which took this start for dead; this one "
            "ends and writes nothing more."
        )

    def _take(self) -> None:
        try:
            retry(self._become_owner, f"Writing {self._file}")
        except OSError as error:
            raise UserError(
                f"{self._file} cannot be written ({error.strerror}); see to that disk, or give another run.dir."
            ) from error
        self._thread.start()

    def _become_owner(self) -> None:
        self._run.path.mkdir(parents=True, exist_ok=True)
        while not self._create():
            self._refuse_if_alive()
            if self._take_over():
                break

    def _create(self) -> bool:
        try:
            with open(self._file, "x", encoding="utf-8") as file:
                file.write(json.dumps(self._facts))
        except FileExistsError:
            return False
        return True

    def _is_mine(self, facts: dict[str, Any] | None) -> bool:
        return facts is not None and facts["token"] == self._facts["token"]

    def _silence(self, file: Path) -> float:
        """Seconds since a file was last touched, by the clock of the disk."""
        probe = file.with_name(f".owner.{self._facts['token']}.probe")
        try:
            probe.touch()
            return probe.stat().st_mtime - file.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _take_over(self) -> bool:
        """Put this start in the place of a dead one, one start at a time; whether it is the owner now."""
        turn = self._file.with_name(".owner.turn")
        try:
            turn.touch(exist_ok=False)
        except FileExistsError:
            time.sleep(0.05)
            with contextlib.suppress(FileNotFoundError):
                if self._silence(turn) > _SILENT_SECONDS:  # it died at this point
                    turn.unlink()
            return False
        try:
            self._refuse_if_alive()
            self._file.unlink(missing_ok=True)
            return self._create()
        finally:
            turn.unlink(missing_ok=True)

    def _refuse_if_alive(self) -> None:
        theirs = _read(self._file)
        with contextlib.suppress(FileNotFoundError):  # it has just left
            if theirs is not None and _is_alive(theirs, self._silence(self._file)):
                raise NotOwner(_refusal(self._run, theirs))

    def _touch(self) -> None:
        while not self._left.wait(_SECONDS_BETWEEN_TOUCHES):
            with contextlib.suppress(OSError):
                if self._is_mine(_read(self._file)):
                    os.utime(self._file)


def _groups() -> ModuleType:
    """Late: torch and Megatron take seconds to load, and who looks at a run needs neither."""
    from megahybrid.parallel import groups

    return groups


def another(run: RunDirectory) -> str | None:
    """The name of a start other than this one that trains the run, or None."""
    facts = read_json(run.owner)
    if facts is None or _is_of_this_start(facts):
        return None
    with contextlib.suppress(OSError):
        if _is_alive(facts, time.time() - run.owner.stat().st_mtime):
            return _name(facts)
    return None


def _is_of_this_start(facts: dict[str, Any]) -> bool:
    ours = _this_process()
    if ours["job"]:  # a job's processes belong together from before they know the token, and after they have ended
        return (facts["job"], facts["restart"]) == (ours["job"], ours["restart"])
    return facts["token"] == _token


def _this_process() -> dict[str, Any]:
    process = os.getpid()
    return {
        "submission": os.environ.get("MEGAHYBRID_SUBMISSION"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "host": socket.gethostname(),
        "processes": _process_namespace(),
        "process": process,
        "began": _beginning(process),
        "time": time.time(),
    }


def _read(file: Path) -> dict[str, Any] | None:
    """The owner's facts; None where there is no file, or one that nobody finishes writing."""
    deadline = time.monotonic() + _SECONDS_TO_BE_WRITTEN
    while True:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        with contextlib.suppress(ValueError):
            return json.loads(text)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


def _is_alive(theirs: dict[str, Any], silence: float) -> bool:
    """Whether an owner must be taken to train still, `silence` seconds after its last touch."""
    ours = _this_process()
    if (theirs["host"], theirs["processes"]) == (ours["host"], ours["processes"]):
        return theirs["began"] is not None and _beginning(theirs["process"]) == theirs["began"]
    if theirs["job"] and theirs["job"] == ours["job"]:
        if theirs["restart"] < ours["restart"]:  # Slurm has ended it
            return False
    elif theirs["submission"] and theirs["submission"] == ours["submission"]:  # the job of a chain before this one
        return False
    return silence < _SILENT_SECONDS


def _beginning(process: int) -> str | None:
    """When a process of this host began, by which a number that is given again is told; None where there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _process_namespace() -> str:
    """Which processes can be seen from here: containers on one host see their own only."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _name(facts: dict[str, Any]) -> str:
    job = f"job {facts['job']}, " if facts.get("job") else ""
    return f"{job}process {facts.get('process', '?')} on {facts.get('host', 'another host')}"


def _refusal(run: RunDirectory, theirs: dict[str, Any]) -> str:
    return (
        f"{run.path} is being trained by {_name(theirs)}; end that first, or give another run.dir (one that was killed "
        f"on another host is taken for dead after {_SILENT_SECONDS:.0f} s)."
    )
