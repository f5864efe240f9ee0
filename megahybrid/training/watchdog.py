"""Heartbeats, and an end to hangs: a process that makes no progress shows where it stands, and all of them end.

Every process has a thread that writes `heartbeat/rank_00000.json` and looks at the time of the last beat. The first to
miss one too long leaves a file that all others of this start see; each then writes the stacks of its threads to its log
and the place where it stands to its heartbeat, so that the cause can say which ranks wait and which one they wait for.
A disk that does not take these files ends nothing, and does not keep a hang from being ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from pathlib import Path
from typing import IO

import megahybrid
from megahybrid.config.schema import WatchConfig
from megahybrid.errors import MachineFault
from megahybrid.files import read_json
from megahybrid.retry import retry
from megahybrid.training import failures
from megahybrid.training.run_directory import RunDirectory

_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_HEARTBEATS = 10.0


class Watchdog:
    """Watches this process while it is entered; `beat` tells it of progress.

    A hang ends the process with exit code 1, `grace` seconds after its stacks were written, so that no other is killed
    before it has written its own.
    """

    def __init__(self, run: RunDirectory, limits: WatchConfig, rank: int, grace: float = 8.0):
        self._run, self._limits, self._rank, self._grace = run, limits, rank, grace
        self._file = run.heartbeats / f"rank_{rank:05d}.json"
        self._alarm = run.heartbeats / f"stuck-{run.start}"
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._log: IO[str] | None = None
        self._main = threading.main_thread().ident
        self._step, self._doing, self._limit, self._since = 0, "starting", limits.start_seconds, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._log = retry(self._open, f"Writing to {self._run.path}")
        faulthandler.enable(self._log)
        self.beat(0, "starting", long=True)
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        with contextlib.suppress(OSError):
            self._log.close()
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _open(self) -> IO[str]:
        for folder in (self._run.heartbeats, self._run.logs):
            folder.mkdir(parents=True, exist_ok=True)
        for left in self._run.heartbeats.glob("stuck*") if self._rank == 0 else ():
            left.unlink(missing_ok=True)
        return open(self._run.logs / f"rank_{self._rank:05d}.log", "a", encoding="utf-8")

    def beat(self, step: int, doing: str = "training", long: bool = False) -> None:
        """Progress: `step` steps are done, and this is what comes now; `long` allows it `start_seconds`."""
        self._step, self._doing, self._since = step, doing, time.monotonic()
        self._limit = self._limits.start_seconds if long else self._limits.step_seconds

    def _arm(self) -> None:
        """Have the process ended some time after the thread should have done so: where native code holds the
        interpreter's lock the thread cannot run, but this can. It ends one thread of its own, waits for it and starts
        another, so that on a busy machine a small model's step would wait for it as long as for its loss."""
        end = self._since + self._limit + 30 + self._grace
        faulthandler.dump_traceback_later(max(1.0, end - time.monotonic()), exit=True, file=self._log)

    def _watch(self) -> None:
        written = -_SECONDS_BETWEEN_HEARTBEATS
        while not self._left.wait(_SECONDS_BETWEEN_LOOKS):
            self._arm()
            now = time.monotonic()
            if now - written >= _SECONDS_BETWEEN_HEARTBEATS:
                self._write()
                written = now
            late = now - self._since > self._limit
            if late or os.path.exists(self._alarm):  # False where the disk cannot tell; Path.exists would raise
                try:
                    self._end(late)
                finally:
                    if not self._left.is_set():
                        os._exit(1)
                return

    def _end(self, first: bool) -> None:
        seconds = time.monotonic() - self._since
        with contextlib.suppress(OSError):
            self._alarm.touch()
            self._log.write(f"No progress for {seconds:.0f} s after step {self._step} ({self._doing}):\n")
            self._log.flush()
        faulthandler.dump_traceback(self._log)
        self._write(_place(sys._current_frames().get(self._main)))
        if self._left.wait(self._grace):
            return
        if first:
            cause = f"No progress for {seconds:.0f} s after step {self._step} ({self._doing})"
            details = ""
            with contextlib.suppress(OSError):
                details = places(self._run)
            hint = "; the ranks that stand apart in this file are the ones to look at."
            failures.record(self._run, MachineFault(cause + hint), self._step, details)
            print(f"megahybrid (rank {self._rank}): {cause}\n{details}", file=sys.stderr, flush=True)
        else:
            self._left.wait(2 * _SECONDS_BETWEEN_LOOKS)  # the first one writes the cause

    def _write(self, place: str = "") -> None:
        heartbeat = {"rank": self._rank, "host": socket.gethostname(), "process": os.getpid(), "time": time.time()}
        heartbeat |= {"start": self._run.start, "step": self._step, "doing": self._doing, "place": place}
        part = self._file.with_suffix(".part")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(heartbeat))
            os.replace(part, self._file)


def places(run: RunDirectory) -> str:
    """Where the processes of this start stand that have said so, ranks at the same place in one line."""
    at = defaultdict(list)
    for path in sorted(run.heartbeats.glob("rank_*.json")):
        heartbeat = read_json(path)
        if heartbeat and heartbeat["start"] == run.start and heartbeat["place"]:
            at[heartbeat["step"], heartbeat["doing"], heartbeat["place"]].append(heartbeat)
    lines = []
    for (step, doing, place), beats in sorted(at.items(), key=lambda each: len(each[1])):
        who = ", ".join(f"{beat['rank']} on {beat['host']}" for beat in beats)
        lines.append(f"rank {who}: step {step}, {doing}, at {place}")
    return "\n".join(lines)


def _place(frame: object) -> str:
    """The innermost function of a stack, and of this package on the way to it."""
    if frame is None:
        return "unknown"
    package = str(Path(megahybrid.__file__).parent)
    stack = traceback.extract_stack(frame)
    innermost_of_ours = [each for each in stack if each.filename.startswith(package)][-1:]
    names = [f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in (stack[-1], *innermost_of_ours)]
    return " < ".join(dict.fromkeys(names))
