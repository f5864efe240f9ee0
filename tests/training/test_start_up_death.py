"""A process is killed after the rendezvous and before the first step: the job goes back into the queue."""

import functools
import os
import signal
import socket
import threading

import pytest

from megahybrid.launch import verdict
from megahybrid.training import attempts, failures
from megahybrid.training.run_directory import RunDirectory


def start(recipe: str, where: str) -> None:
    """In a worker: a task of Slurm, whose rank 1 is killed on the way."""
    from megahybrid.launch import task
    from megahybrid.parallel import peers
    from megahybrid.training import loop

    peers._SECONDS_TO_CONNECT = 1.0  # rank 0 may wait for a rank 1 that is gone

    for ours, slurm in (("RANK", "PROCID"), ("RANK", "LOCALID"), ("WORLD_SIZE", "NTASKS")):
        os.environ[f"SLURM_{slurm}"] = os.environ[ours]
    os.environ.update(SLURM_NNODES="1", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1", MEGAHYBRID_SUBMISSION="one")

    def killed(real, waits, *arguments):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if waits:
            threading.Event().wait()
        return real(*arguments)

    quick = functools.partial(loop.PeerWatch, grace=0.5)  # the pool ends all 5 s after the first
    loop.PeerWatch = functools.partial(killed, quick, False) if where == "before the watch" else quick
    loop.self_check = functools.partial(killed, loop.self_check, where == "others wait for ever")
    task.main(recipe)


@pytest.mark.parametrize("where", ["before the watch", "others fail", "others wait for ever"])
def test_the_job_is_put_back_into_the_queue(where, workers, recipe, tmp_path, monkeypatch):
    """The others wait as in a collective of NCCL, or fail as in gloo's; nothing of the start before is taken for it."""
    for name, value in (("JOB_ID", "7"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    run = RunDirectory(tmp_path / "run")
    failures.record(run, ValueError("odd"), 3)
    with pytest.raises(AssertionError, match="the process died"):
        workers.run(2, "tests.training.test_start_up_death:start", str(recipe), where)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    code, said = verdict.judge(run, 1)
    assert code == verdict.GO_ON
    assert attempts.has_begun(run) == (where != "before the watch")
    if where != "before the watch":
        assert f"Rank 1 on {socket.gethostname()} died" in said
    status = run.read_status()
    assert (status["state"], status["again"], status["restart"]) == ("failed", True, 1)
