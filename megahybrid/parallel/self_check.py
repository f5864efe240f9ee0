"""A quick look at every GPU and link before the first step, so that a bad node is named and not waited for."""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist

from megahybrid.errors import MachineFault
from megahybrid.parallel import groups

log = logging.getLogger(__name__)

_SLOW = 0.7  # of the median speed


def self_check(needed: float) -> None:
    """Compute on every device and send between all nodes, collectively; about a second.

    Args:
        needed: bytes that a GPU will hold at most; where other processes have left less, it is said.

    Raises MachineFault, on every process, which names the nodes whose GPU or link gave a wrong result. What is merely
    slow is told in the log.
    """
    began, device = time.perf_counter(), groups.device()
    fault, speed = _check_device(device, needed)
    checks = groups.gather((_name(), fault, speed))
    _raise_faults((name, fault) for name, fault, _ in checks)
    _warn_about_slow("computes", [(name, speed) for name, _, speed in checks])
    if dist.get_world_size() > 1:
        _check_sum(device)
        links = [link for link in groups.gather(_check_link(device)) if link]
        _raise_faults((name, fault) for name, fault, _ in links)
        _warn_about_slow("sends", [(name, speed) for name, _, speed in links])
    log.info("Devices and links checked in %.1f s.", time.perf_counter() - began)


def _check_device(device: torch.device, needed: float) -> tuple[str | None, float]:
    """A matrix product of small whole numbers, exact in every precision: (what is wrong, products a second)."""
    size = 4096 if device.type == "cuda" else 64
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        # Row i of a is i % 3 everywhere, column j of b is j % 5 everywhere: the product is size * (i % 3) * (j % 5).
        rows, columns = torch.arange(size, device=device) % 3, torch.arange(size, device=device) % 5
        a, b = rows.to(dtype)[:, None].expand(-1, size).contiguous(), columns.to(dtype).expand(size, -1).contiguous()
        right = torch.equal((a @ b).long(), size * rows[:, None] * columns)
        began = time.perf_counter()
        for _ in range(8):
            product = a @ b
        product[0, 0].item()
        speed = 8 / (time.perf_counter() - began)
        free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (1, 1)
    except torch.OutOfMemoryError:
        return "its memory is taken by another process", 0.0
    except RuntimeError as error:
        return f"it fails to compute ({str(error).splitlines()[0][:100]})", 0.0
    if not right:
        return "it computes a matrix product wrongly", 0.0
    return _too_little(free, total, needed), speed


def _too_little(free: float, total: float, needed: float) -> str | None:
    """What is wrong where others have taken so much memory that a run has too little, however high its estimate."""
    if free >= min(needed, 0.8 * total):
        return None
    taken, total, needed = (number / 2**30 for number in (total - free, total, needed))
    return f"{taken:.1f} of its {total:.1f} GiB of memory are taken, and this run needs {needed:.1f}"


def _check_sum(device: torch.device) -> None:
    world = dist.get_world_size()
    values = torch.full((2**20,), dist.get_rank() + 1, dtype=torch.float32, device=device)
    dist.all_reduce(values)
    fault = None if bool((values == world * (world + 1) // 2).all()) else "a sum over all processes came out wrong"
    _raise_faults(groups.gather((_name(), fault)))


def _check_link(device: torch.device) -> tuple[str, str | None, float] | None:
    """Send to the next node and receive from the one before: (its name, what is wrong, messages a second).

    The first process of every node takes part; None for the others, and where there is one node only.
    """
    hosts = groups.gather(socket.gethostname())
    first = sorted({host: rank for rank, host in reversed(list(enumerate(hosts)))}.values())
    if len(first) < 2 or dist.get_rank() not in first:
        return None
    place = first.index(dist.get_rank())
    before, after = first[place - 1], first[(place + 1) % len(first)]
    count = 2**24 if device.type == "cuda" else 2**18
    sent = torch.arange(count, dtype=torch.float32, device=device) + dist.get_rank()
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        ends = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
        for request in dist.batch_isend_irecv(ends):
            request.wait()
        received[-1].item()
        seconds.append(time.perf_counter() - began)
    expected = torch.arange(count, dtype=torch.float32, device=device) + before
    fault = None if torch.equal(received, expected) else "what is sent there arrives changed"
    return f"the link from {hosts[before]} to {hosts[dist.get_rank()]}", fault, 1 / min(seconds)


def _name() -> str:
    place = f"GPU {torch.cuda.current_device()}" if torch.cuda.is_available() else "process"
    return f"node {socket.gethostname()}, {place} (rank {dist.get_rank()} of this start, {os.getpid()})"


def _raise_faults(found) -> None:
    faults = [f"{name}: {fault}" for name, fault in found if fault]
    if faults:
        raise MachineFault(f"The check before the first step failed at {'; '.join(faults)}; leave that node out.")


def _warn_about_slow(does: str, speeds: list[tuple[str, float]]) -> None:
    usual = statistics.median(speed for _, speed in speeds) if speeds else 0.0
    for name, speed in speeds:
        if speed < _SLOW * usual and torch.cuda.is_available():
            log.warning("%s %s at %.0f %% of the usual speed.", name, does, 100 * speed / usual)
