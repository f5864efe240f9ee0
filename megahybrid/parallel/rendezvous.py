"""Meeting the other processes, with a sentence about those that do not come."""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch.distributed import Store

from megahybrid.errors import MachineFault

_SECONDS_TO_TELL = 10.0


def meet(rank: int, world: int, seconds: float) -> Store:
    """A store that all processes have joined, kept by rank 0 at MASTER_ADDR:MASTER_PORT.

    Under torchrun its agent keeps the store, and has seen to it that all are there. Raises MachineFault, which names
    the missing ranks and their nodes, where not all of them come within `seconds`.
    """
    timeout = datetime.timedelta(seconds=seconds)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        return store
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, world, rank == 0, timeout, wait_for_workers=False)
        store.set(f"here/{rank}", socket.gethostname())
        absent = _wait_for(store, "here", range(world), seconds) if rank == 0 else []
        if rank == 0:
            store.set("absent", _names(absent, world) if absent else "")
        store.wait(["absent"], timeout + datetime.timedelta(seconds=15))
        names = store.get("absent").decode()
        store.set(f"told/{rank}", "")
    except dist.DistError as error:
        raise MachineFault(
            f"{socket.gethostname()} got no answer from rank 0 at {address}:{port} within {seconds:.0f} s "
            f"({str(error).splitlines()[0][:100]}); see what became of that process, and whether the port is open."
        ) from error
    if names:
        if rank == 0:  # the store ends with this process: not before the others know
            _wait_for(store, "told", [each for each in range(world) if each not in absent], _SECONDS_TO_TELL)
        raise MachineFault(f"{names} did not come to {address}:{port} within {seconds:.0f} s; see what is wrong.")
    return dist.PrefixStore("groups", store)


def _wait_for(store: Store, key: str, ranks: Iterable[int], seconds: float) -> list[int]:
    """Wait until all these ranks have set their key; those that have not within `seconds`."""
    deadline, missing = time.monotonic() + seconds, list(ranks)
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"{key}/{rank}"])]
        if missing:
            time.sleep(0.05)
    return missing


def _names(ranks: Sequence[int], world: int) -> str:
    """The ranks by node, as far as the launcher says which nodes there are (MEGAHYBRID_NODES, in order)."""
    nodes = os.environ.get("MEGAHYBRID_NODES", "").split()
    if not nodes or world % len(nodes):
        return f"Ranks {', '.join(map(str, ranks))}"
    a_node = world // len(nodes)
    by_node: dict[str, list[str]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank // a_node], []).append(str(rank))
    return "; ".join(f"node {node} (rank {', '.join(of_it)})" for node, of_it in by_node.items())
