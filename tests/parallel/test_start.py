"""The start of a group: who is missing is named, and so is a node whose device computes wrongly."""

import os
import socket
import threading

import pytest

from megahybrid.errors import MachineFault
from megahybrid.parallel import rendezvous
from tools.workers import free_port


def meet(rank: int, said: dict) -> None:
    try:
        said[rank] = rendezvous.meet(rank, 4, seconds=2)
    except MachineFault as error:
        said[rank] = str(error)


def test_those_who_do_not_come_are_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("MEGAHYBRID_NODES", "a b")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    said: dict = {}
    threads = [threading.Thread(target=meet, args=(rank, said)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(said) == {0, 1}
    assert all("node b (rank 2, 3) did not come" in each for each in said.values())


def test_a_first_rank_that_is_away_is_told(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(MachineFault, match="got no answer from rank 0 at"):
        rendezvous.meet(1, 2, seconds=1)


def check(wrong: int | None) -> str | None:
    """In a worker: the self-check, where rank `wrong` computes wrongly and every rank is a node of its own."""
    from megahybrid.config.schema import ParallelConfig
    from megahybrid.parallel import groups, self_check

    groups.initialize(ParallelConfig())
    rank = int(os.environ["RANK"])
    real, host = self_check._check_device, socket.gethostname
    socket.gethostname = lambda: f"node{rank}"
    if rank == wrong:
        self_check._check_device = lambda device, needed: ("it computes a matrix product wrongly", 0.0)
    try:
        self_check.self_check(needed=0)
    except MachineFault as error:
        return str(error)
    finally:
        self_check._check_device, socket.gethostname = real, host
    return None


@pytest.mark.parametrize("wrong", [None, 1])
def test_a_node_that_computes_wrongly_is_named(workers, wrong):
    said = workers.run(3, "tests.parallel.test_start:check", wrong)
    if wrong is None:
        assert said == [None] * 3
    else:
        assert all("failed at node node1" in each and "node0" not in each for each in said)


def test_runs_share_a_gpu_that_has_room_for_them():
    from megahybrid.parallel.self_check import _too_little

    free, total = 30 * 2**30, 80 * 2**30
    assert _too_little(free, total, needed=2 * 2**30) is None
    told = "50.0 of its 80.0 GiB of memory are taken, and this run needs 40.0"
    assert _too_little(free, total, needed=40 * 2**30) == told
    # An estimate above what a GPU has: training will tell, unless others are on it.
    assert _too_little(0.9 * total, total, needed=1.1 * total) is None
    assert _too_little(0.7 * total, total, needed=1.1 * total)
