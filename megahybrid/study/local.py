"""Runs as processes of this machine, several side by side."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Set
from pathlib import Path

from megahybrid import code_version
from megahybrid.config import Config, save_config
from megahybrid.devices import visible_gpus
from megahybrid.files import write_json
from megahybrid.launch import pinned
from megahybrid.training import attempts
from megahybrid.training.run_directory import RunDirectory


class Processes:
    """Runs that train at once, each a process with a copy of the code as it is now, spread over the GPUs.

    Left early, all are asked to stop, and are waited for until they have saved; asked once more, they are killed. They
    have process groups of their own: a terminal's Ctrl-C reaches the launching process alone.
    """

    def __init__(self, folder: Path, jobs: int):
        """`folder`: of the study, whose submit/ gets the code; `jobs`: how many will run side by side."""
        self._jobs = jobs
        self._submission = f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._code = folder.resolve() / "submit" / self._submission / "code"
        self._processes: dict[Path, subprocess.Popen] = {}
        self._gpus: dict[Path, str] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for process in self._processes.values():
                process.terminate()
            for process in self._processes.values():
                process.wait()
        except BaseException:
            for process in self._processes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            raise

    @property
    def running(self) -> set[Path]:
        """The run directories of those that have not ended."""
        return set(self._processes)

    def start(self, config: Config, study: str, running: Set[Path]) -> None:
        """Train a configuration of a study's file, on the GPU that the fewest of the runs in these directories, which
        another launch may have left running, are on; what it prints goes to its run's logs/rank_00000.out."""
        if not self._code.exists():
            pinned.pin(self._code)
        run = RunDirectory(config.run.dir)
        record = run.path / "submit" / self._submission
        facts = {"submission": self._submission, "jobs": [], "code_version": code_version(), "recipe": study}
        save_config(config, record / "config.yaml")
        write_json(record / "job.json", {**facts, "overrides": []})
        run.logs.mkdir(exist_ok=True)
        environment = os.environ | self._environment()
        if gpus := visible_gpus():
            taken = Counter(self._gpus.get(path) or _gpu_of(path) for path in running | self.running)
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[run.path] = min(gpus, key=lambda gpu: taken[gpu])
        with open(run.logs / "rank_00000.out", "ab") as output:
            self._processes[run.path] = subprocess.Popen(
                [sys.executable, "-m", "megahybrid", "train", str(record / "config.yaml")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                process_group=0,
            )

    def _environment(self) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0))
        path = os.environ.get("PYTHONPATH")
        return {
            "MEGAHYBRID_SUBMISSION": self._submission,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // self._jobs))),
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": f"{self._code}:{path}" if path else str(self._code),
        }

    def wait(self, seconds: float) -> list[Path]:
        """Wait so long, or until one has ended; the run directories of those that have."""
        deadline = time.monotonic() + seconds
        while not (ended := [path for path, process in self._processes.items() if process.poll() is not None]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for path in ended:
            self._gpus.pop(path, None)
            self._note_early_end(RunDirectory(path), self._processes.pop(path).returncode)
        return ended

    def _note_early_end(self, run: RunDirectory, status: int) -> None:
        """Of a process that failed before it could say anything."""
        began = (run.path / "submit" / self._submission / "job.json").stat().st_mtime
        if status and not (run.status.exists() and run.status.stat().st_mtime > began):
            run.end_status("failed", f"it ended before training began (exit status {status})")


def _gpu_of(path: Path) -> str | None:
    """That the run in this directory was started on last."""
    starts = attempts.read(RunDirectory(path))
    return starts[-1].get("gpus") if starts else None
