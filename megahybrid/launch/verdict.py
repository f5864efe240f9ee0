"""After the processes of a job have ended: is the run done, to go on, or failed? `python -m …verdict RUN_DIR`.

Exit code 0: done, or cancelled; 75: there is more to do, and starting again may do it; 1: failed for good.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megahybrid.errors import UserError
from megahybrid.launch import slurm
from megahybrid.training.run_directory import RunDirectory

GO_ON = 75


def main() -> int:
    """Print what became of the run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--exit-code", type=int, default=0, help="of srun")
    parsed = parser.parse_args()
    code, words = judge(RunDirectory(parsed.run), parsed.exit_code)
    print(f"megahybrid: {words}", flush=True)
    if code != GO_ON:
        _cancel_chain()
    return code


def judge(run: RunDirectory, exit_code: int) -> tuple[int, str]:
    """The verdict on this start of the job, and a sentence about it; status.json tells the same afterwards."""
    status = run.read_status()
    ours = (status.get("job"), status.get("restart")) == (
        os.environ.get("SLURM_JOB_ID"),
        int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )
    if not ours:
        if exit_code == 0:  # a job of a chain after the last step: nothing was left to do
            return 0, f"{run.path} is done."
        cause = f"The processes ended before training began (srun's exit code {exit_code}); see {run.logs}/rank_*.out."
        run.end_status("failed", cause)
        return 1, cause
    if status["state"] == "running":  # nobody was left to write
        cause = f"All processes ended without a word (srun's exit code {exit_code}); see {run.logs}/rank_*.out."
        run.end_status("failed", cause, again=True)
        return GO_ON, cause
    at = f"step {status['step']} of {status['target']}"
    if status["state"] == "done":
        return 0, f"{run.path} is done: {at}."
    if status["state"] == "stopped":
        if status["reason"] == "SIGTERM":
            return 0, f"Cancelled, or preempted, at {at}; the state is saved."
        return GO_ON, f"Stopped by {status['reason']} at {at}; the state is saved."
    failure = run.failure.read_text(encoding="utf-8") if run.failure.exists() else status["reason"]
    return (GO_ON if status["again"] else 1), f"Failed at {at}: {failure}"


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
