"""A process that dies or fails ends the others within seconds, even while they wait for what never comes."""

import signal
import socket
import subprocess
import time

import pytest

from tests.workers import environment, free_port, python

PROGRAM = """
import logging, sys, threading, time
from megahybrid.config.schema import ParallelConfig
from megahybrid.errors import UserError
from megahybrid.parallel import groups
from megahybrid.parallel.peers import PeerWatch

groups.initialize(ParallelConfig())
rank, _ = groups.world()
with PeerWatch(grace=1.0) as peers:
    peers.last_words = lambda cause: print("last words:", cause, flush=True)
    print("watching", flush=True)
    what = sys.argv[1].split(",")[rank]
    if what == "wait":  # as in a collective of NCCL
        threading.Event().wait()
    if what == "fail":
        raise UserError("The disk is full; make room.")
    time.sleep(float(what))
print("left", flush=True)
time.sleep(1.0)
"""


def start(*behaviour: str) -> list[subprocess.Popen]:
    processes, port = [], free_port()
    for rank in range(len(behaviour)):
        place = {"RANK": str(rank), "WORLD_SIZE": str(len(behaviour))}
        surroundings = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **place)
        command = [python(), "-c", PROGRAM, ",".join(behaviour)]
        processes.append(
            subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    for process in processes:
        assert process.stdout.readline() == "watching\n", process.stderr.read()[-2000:]
    return processes


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim):
    processes = start("wait", "wait", "wait")
    time.sleep(0.2)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=30)
        if rank != victim:
            assert process.returncode == 1
            assert f"last words: Rank {victim} on {socket.gethostname()} died" in out
            assert f"(rank {rank}): Rank {victim} on {socket.gethostname()} died" in err
    assert time.monotonic() - began < 10


def test_a_failure_is_told_to_the_others():
    failing, waiting = start("fail", "wait")
    assert "The disk is full" in failing.communicate(timeout=30)[1]
    out, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 1
    assert f"Rank 0 on {socket.gethostname()} failed: The disk is full; make room." in out


def test_normal_ends_at_different_times_are_silent():
    for process in start("0.1", "0.6", "1.8"):
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "left\n"), err
        assert "Rank" not in err
