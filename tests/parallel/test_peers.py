"""A process that dies or fails ends the others within seconds, even while they wait for what never comes."""

import json
import signal
import socket
import subprocess
import threading
import time
from queue import Queue

import pytest

from megahybrid.errors import MachineFault
from megahybrid.parallel import groups, peers
from tools.workers import environment, free_port, python

PROGRAM = """
import logging, sys, threading, time
from megahybrid.config.schema import ParallelConfig
from megahybrid.errors import UserError
from megahybrid.parallel import groups
from megahybrid.parallel.peers import PeerWatch

groups.initialize(ParallelConfig())
rank, _ = groups.world()
with PeerWatch(lambda cause: print("last words:", type(cause).__name__, cause, flush=True), grace=1.0):
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
            assert f"last words: MachineFault Rank {victim} on {socket.gethostname()} died" in out
            assert f"(rank {rank}): Rank {victim} on {socket.gethostname()} died" in err
    assert time.monotonic() - began < 10


def test_a_failure_is_told_to_the_others():
    failing, waiting = start("fail", "wait")
    assert "The disk is full" in failing.communicate(timeout=30)[1]
    out, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 1
    assert f"UserError Rank 0 on {socket.gethostname()} failed: The disk is full; make room." in out


@pytest.fixture
def entering(monkeypatch):
    """Rank 0 of two as it waits for the other one: its watch, and the address."""
    port = Queue()
    monkeypatch.setattr(groups, "world", lambda: (0, 2))
    monkeypatch.setattr(groups, "broadcast", lambda value: port.put(value) or value)
    monkeypatch.setattr(peers, "_SECONDS_TO_GREET", 1.0)
    watch = peers.PeerWatch(lambda cause: None)
    thread = threading.Thread(target=watch.__enter__)
    thread.start()
    yield watch, thread, ("127.0.0.1", port.get(timeout=10))
    thread.join(10)
    watch.__exit__(None, None, None)


@pytest.mark.parametrize("greeting", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n"], ids=["silent", "http", "json"])
def test_a_stranger_does_not_keep_the_processes_from_each_other(greeting, entering):
    watch, thread, address = entering
    with socket.create_connection(address) as stranger, socket.create_connection(address, timeout=10) as member:
        stranger.sendall(greeting)
        member.sendall(b'{"name": "Rank 1"}\n')
        thread.join(10)
        assert not thread.is_alive() and list(watch._members.values()) == ["Rank 1"]
        assert json.loads(member.recv(1000))["name"].startswith("Rank 0 on")
        member.sendall(b'{"left": null, "machine": false}\n')


def test_a_fault_of_the_machine_is_one_for_the_others_too(entering):
    """Its own disk may not have taken why it ended: the others' word must let the job be put back into the queue."""
    watch, thread, address = entering
    with socket.create_connection(address, timeout=10) as member:
        member.sendall(b'{"name": "Rank 1"}\n')
        thread.join(10)
        assert b"Rank 0 on" in member.recv(1000)
        member.sendall(b'{"left": "Its disk is gone.", "machine": true}\n')
        cause = watch.explain(RuntimeError("gloo lost a connection"))
        assert type(cause) is MachineFault and str(cause) == "Rank 1 failed: Its disk is gone."
        assert json.loads(member.recv(1000)) == {"cause": str(cause), "machine": True}
        watch.__exit__(MachineFault, MachineFault("A GPU is gone."), None)
        assert json.loads(member.recv(1000)) == {"left": "A GPU is gone.", "machine": True}


@pytest.mark.parametrize(
    "error", [TimeoutError(110, "keepalive"), OSError(113, "No route to host"), ConnectionResetError()]
)
def test_a_node_that_vanishes_has_died(error):
    """What TCP's keepalive reports is no end of the watch, but of the process at the other end."""

    class Gone:
        def recv(self, size):
            raise error

    watch = peers.PeerWatch(lambda cause: None)
    watch._members[connection := Gone()] = "Rank 3 on n2"
    cause = watch._news_from(connection)
    assert type(cause) is MachineFault and str(cause).startswith("Rank 3 on n2 died")


def test_normal_ends_at_different_times_are_silent():
    for process in start("0.1", "0.6", "1.8"):
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "left\n"), err
        assert "Rank" not in err
