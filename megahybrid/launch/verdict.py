"""After the processes of a job have ended: is the run done, to go on, or failed? `python -m …verdict RUN_DIR`.

Exit code 0: done, or cancelled; 75: there is more to do, and starting again may do it; 1: failed for good.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from megahybrid.config import load_config
from megahybrid.config.schema import WatchConfig
from megahybrid.errors import MachineFault, UserError
from megahybrid.launch import slurm
from megahybrid.launch.task import GO_ON
from megahybrid.retry import retry
from megahybrid.training import attempts, failures
from megahybrid.training.run_directory import RunDirectory


def main() -> int:
    """Print what became of the run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--exit-code", type=int, default=0, help="of srun")
    parser.add_argument("--config", type=Path, help="that was trained, for its train.watch.restarts")
    parsed = parser.parse_args()
    try:
        code, words = judge(RunDirectory(parsed.run), parsed.exit_code, _restarts(parsed.config))
    except (OSError, MachineFault) as error:
        code, words = GO_ON, f"What became of {parsed.run} cannot be read ({error}); it is started again."
    print(f"megahybrid: {words}", flush=True)
    if code != GO_ON:
        _cancel_chain()
    return code


def judge(run: RunDirectory, exit_code: int, restarts: int = WatchConfig.restarts) -> tuple[int, str]:
    """The verdict on this start of the job, and a sentence about it; status.json tells the same afterwards.

    `restarts` is how many starts whose processes do not even meet are put back into the queue.
    """
    status = retry(run.read_status, f"Reading {run.status}")
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    ours = (status.get("job"), status.get("restart")) == (job, restart)
    failure = failures.read(run)
    if failure is None:
        if ours and status["state"] != "running":
            return _judge_end(run, status)
        if not ours and exit_code == 0:  # after the last step nothing was left to do
            return 0, f"{run.path} is done."
        failure = failures.recorded(run, _silent_end(run, exit_code, ours or attempts.has_begun(run)))
    return _judge_failure(run, failure, restarts)


def _judge_end(run: RunDirectory, status: dict[str, Any]) -> tuple[int, str]:
    """The verdict on a start that came to an end by itself."""
    at = f"step {status['step']} of {status['target']}"
    if status["state"] == "stopped" and status["reason"] in ("SIGTERM", "SIGINT"):
        return 0, f"Cancelled, or preempted, at {at}; the state is saved."
    if status["state"] == "stopped":
        return GO_ON, f"Stopped by {status['reason']} at {at}; the state is saved."
    if status["state"] == "failed":  # whose own record is lost
        return GO_ON if status["again"] else 1, f"Failed at {at}: {status['reason']}"
    return 0, f"{run.path} is done: {at}."


def _silent_end(run: RunDirectory, exit_code: int, had_begun: bool) -> UserError:
    """What has ended processes that left no word: a machine, unless they ended by themselves before training began."""
    see = f"(srun's exit code {exit_code}); see {run.logs}/rank_*.out."
    if had_begun:
        return MachineFault(f"All processes ended without a word {see}")
    if exit_code > 128 or exit_code == GO_ON:  # killed by a signal, or the disk did not even give the configuration
        return MachineFault(f"A machine ended the processes before training began {see}")
    shared = " All nodes have to see that folder." if len(os.environ.get("MEGAHYBRID_NODES", "").split()) > 1 else ""
    return UserError(f"The processes ended before training began {see}{shared}")


def _judge_failure(run: RunDirectory, failure: failures.Failure, restarts: int) -> tuple[int, str]:
    """The verdict on a start that has failed."""
    if failure.again and (fault := attempts.note_lost(run, restarts)):
        failures.forget(run)
        failure = failures.recorded(run, UserError(fault), details=failure.text)
    with contextlib.suppress(OSError):
        failures.tell(run)
    code = GO_ON if failure.again else 1
    if not failure.ours:
        return code, failure.text
    status = retry(run.read_status, f"Reading {run.status}")
    return code, f"Failed at step {status.get('step', 0)} of {status.get('target', 0)}: {failure.text}"


def _restarts(config: Path | None) -> int:
    """The configuration's train.watch.restarts, the default where there is none that can be read."""
    with contextlib.suppress(UserError, OSError):
        if config is not None:
            return retry(lambda: load_config(config), f"Reading {config}").train.watch.restarts
    return WatchConfig.restarts


def _cancel_chain() -> None:
    """Cancel the later jobs of a chain, which would find nothing to do."""
    submission, mine = os.environ.get("MEGAHYBRID_SUBMISSION"), os.environ.get("SLURM_JOB_ID")
    try:
        for job in slurm.jobs():
            if job.comment == submission and job.state == "PENDING" and job.id != mine and job.array is None:
                slurm.cancel(job.id)
    except UserError as error:
        print(f"megahybrid: the other jobs of the chain stay in the queue ({error})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
