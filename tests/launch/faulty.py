"""Runs a module as Python does, with a fault put into training: `python faulty.py -m MODULE …`.

FAULT is "raise RANK STEP", "break RANK STEP" (a fault of the machine), "hang RANK STEP" or "kill RANK 0" (before the
first step, while the others wait as in a collective of NCCL); the last two come in the job's first start only. PAUSE
lengthens steps.
"""

import os
import runpy
import signal
import sys
import time


def install(kind: str, rank: int, at: int, pause: float) -> None:
    from megahybrid.errors import MachineFault
    from megahybrid.training import loop
    from megahybrid.training.engine import Engine

    real, first = Engine.step, os.environ.get("SLURM_RESTART_COUNT", "0") == "0"

    def killed(needed):
        if int(os.environ["SLURM_PROCID"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    def step(self, batches, step, *flags, **others):
        time.sleep(pause)
        if int(os.environ["SLURM_PROCID"]) == rank and step == at:
            if kind == "raise":
                raise ValueError("the seventh batch is odd")
            if kind == "break":
                raise MachineFault(f"A GPU fell off the bus in start {os.environ.get('SLURM_RESTART_COUNT', '0')}.")
            if kind == "hang" and first:
                time.sleep(600)
        return real(self, batches, step, *flags, **others)

    Engine.step = step
    if kind == "kill" and first:
        loop.self_check = killed


if __name__ == "__main__":
    del sys.argv[:2]
    if sys.argv[0].endswith(".task"):
        kind, rank, at = os.environ.get("FAULT", "none -1 -1").split()
        install(kind, int(rank), int(at), float(os.environ.get("PAUSE", "0")))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
