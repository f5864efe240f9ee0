"""What a run stands on beside the kernels: software, devices, links between GPUs, disk, data."""

from __future__ import annotations

import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megahybrid import code_version
from megahybrid.config.schema import Config
from megahybrid.data.documents import TRAIN, VALIDATION
from megahybrid.data.opened import open_data
from megahybrid.data.prepared import open_store
from megahybrid.data.shards import ShardReader
from megahybrid.devices import prepare_allocator
from megahybrid.doctor.finding import Finding
from megahybrid.errors import UserError
from megahybrid.scaling.parameters import parameter_specs
from megahybrid.training import checkpoint_folder
from megahybrid.training.resume import Start
from megahybrid_kernels.judging.measuring import device_name, milliseconds
from megahybrid_kernels.targets import table_of

_WRITTEN = 2**28  # bytes
_LINK_SECONDS = 90.0
_OLDEST_TRITON = (3, 6)


def software() -> Iterator[Finding]:
    """Versions of what computes, and how it takes memory."""
    parts = [f"megahybrid {code_version()}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda:
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not loaded"
        parts += [f"CUDA {torch.version.cuda}", f"NCCL {nccl}"]
    yield Finding(", ".join(parts))
    yield Finding(f"torch's allocator: {prepare_allocator()}")
    try:
        import triton
    except ImportError as error:
        yield Finding(f"Triton cannot be imported ({error}); install it.", not torch.cuda.is_available())
        return
    old = tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON
    yield Finding(f"Triton {triton.__version__}" + ("; the kernels need 3.6 or newer" if old else ""), not old)


def devices(device: torch.device) -> Iterator[Finding]:
    """Every GPU with its free memory, and how fast the first one copies."""
    if device.type != "cuda":
        yield Finding(f"{device_name(device)}; no GPU is seen: every op runs its PyTorch path")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        taken = free < 0.8 * total
        yield Finding(
            f"GPU {number}: {torch.cuda.get_device_name(number)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            + ("; other processes hold the rest" if taken else ""),
            not taken,
        )
        table = table_of(torch.device("cuda", number))
        yield Finding(
            f"GPU {number} has no launches made for it: every op runs its PyTorch path"
            if table is None
            else f"GPU {number} takes the launches of the table {table.name}"
        )
    source = torch.zeros(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = milliseconds(lambda: target.copy_(source), device, 0.05)[1] / 1e3
    yield Finding(f"a copy on GPU 0 moves {2 * source.nbytes / seconds / 1e9:,.0f} GB/s")


def links(processes: int | None = None) -> Iterator[Finding]:
    """A sum over this host's GPUs, by `processes` of them; over CPU processes where there is no GPU."""
    world = torch.cuda.device_count() if processes is None else processes
    if world < 2:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    try:
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            place |= {"MASTER_PORT": port}
            environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
            command = [sys.executable, "-m", "megahybrid.doctor.collective"]
            ranks.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True))
        deadline, said = time.monotonic() + _LINK_SECONDS, []
        for rank in ranks:
            said.append(rank.communicate(timeout=max(1.0, deadline - time.monotonic())))
    except subprocess.TimeoutExpired:
        yield Finding(f"a sum over {world} processes has not come after {_LINK_SECONDS:.0f} s", False)
        return
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    failed = [number for number, rank in enumerate(ranks) if rank.returncode]
    if failed:
        last = (said[failed[0]][1].strip().splitlines() or ["without a word"])[-1]
        yield Finding(f"a sum over {world} processes fails on process {failed[0]}: {last[:300]}", False)
        return
    yield Finding(said[0][0].strip())


def disk(config: Config | None) -> Iterator[Finding]:
    """How fast run.dir, or the current folder, takes data, and whether it has room for the checkpoints."""
    place = Path(config.run.dir if config else ".").absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    block = os.urandom(2**24)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            began = time.perf_counter()
            for _ in range(min(_WRITTEN, free // 2) // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = file.tell() / (time.perf_counter() - began)
    except OSError as error:
        yield Finding(f"{place} cannot be written: {error.strerror}", False)
        return
    text = f"{place} takes {speed / 1e9:.2f} GB/s and has {free / 1e9:,.1f} GB free"
    if config is None:
        yield Finding(text)
        return
    # Weights and two moments in fp32; one more than is kept, while it is being written.
    one = 12 * sum(math.prod(spec.shape) for spec in parameter_specs(config).values())
    kept = config.checkpoint.keep + checkpoint_folder.milestones(config.checkpoint, config.train.steps)
    needed = one * (kept + 1)
    text += f"; {kept} checkpoints of {one / 1e9:.1f} GB and one being written take"
    yield Finding(f"{text} {needed / 1e9:.1f} GB", needed <= free)


def start(config: Config | None) -> Iterator[Finding]:
    """The checkpoint with which a run that is started now goes on, or begins as a branch."""
    if config is None:
        return
    try:
        found = Start.of(config, config.train.resume_from)
        found.check(config)
        if found.checkpoint is not None:
            yield Finding(f"{'a branch of' if found.branches else 'goes on from'} {found.checkpoint}")
    except UserError as error:
        yield Finding(str(error), False)


def data(config: Config | None) -> Iterator[Finding]:
    """Whether the recipe's data is prepared: every shard there in its size, the first and last of each split right."""
    if config is None:
        return
    try:
        opened = open_data(config)
        yield Finding(f'data.identity is "{opened.identity}"')
        if (prepared := opened.prepared) is None:
            yield Finding("all sources are tasks, made while training")
            return
        for split in (TRAIN, VALIDATION):
            sources = prepared.sources_of(split)
            if not sources:
                yield Finding(f"{split}: nothing", split != TRAIN)
                continue
            reader = ShardReader(prepared, open_store(config), split, sources, config.train.seq_length)
            try:
                for index in (0, len(reader) - 1):
                    reader[index]
                counts = (
                    f"{len(reader):,} samples of {config.train.seq_length:,} tokens in {len(reader.shards):,} shards"
                )
            finally:
                reader.close()
            yield Finding(f"{split}: {counts}")
    except UserError as error:
        yield Finding(str(error), False)
