"""One process of `doctor`'s sum over the GPUs of a host; the first prints how fast it went."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

_CALLS = 5


def main() -> int:
    """Sum over all processes, in the surroundings that RANK and the like describe; 1 where the sum is wrong."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    count = 2**26 if on_gpu else 2**20
    values = torch.empty(count, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(_CALLS):
        values.fill_(rank + 1)
        dist.barrier()
        _finish(on_gpu)
        began = time.perf_counter()
        dist.all_reduce(values)
        _finish(on_gpu)
        seconds.append(time.perf_counter() - began)
        if not bool((values == world * (world + 1) // 2).all()):
            print(f"the sum is wrong on process {rank}", file=sys.stderr)
            return 1
    if rank == 0:
        # What every link carries in a ring: each part goes around twice, but for its own process.
        rate = 2 * (world - 1) / world * values.nbytes / min(seconds) / 1e9
        by = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if on_gpu else "gloo"
        print(f"a sum over {world} processes by {by} is right, {rate:,.1f} GB/s on the bus")
    dist.destroy_process_group()
    return 0


def _finish(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
