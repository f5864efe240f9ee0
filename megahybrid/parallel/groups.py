"""Process groups: torch.distributed first, then Megatron-core makes all model parallel groups."""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megahybrid.config.schema import ParallelConfig
from megahybrid.errors import UserError
from megahybrid.parallel.cpu import prepare_cpu
from megahybrid.parallel.rendezvous import meet

Result = TypeVar("Result")
_store: dist.Store
_questions = itertools.count()  # that were asked of it
# tensor_parallel() and context_parallel(), which every layer asks for; empty while there are no groups.
_places: dict[str, tuple[int, int]] = {}


def initialize(
    parallel: ParallelConfig, seed: int = 0, join_seconds: float = 300, collective_seconds: float = 600
) -> None:
    """Join the process group that the environment describes (torchrun's RANK, WORLD_SIZE, …), or a group of one.

    Waits `join_seconds` for the others to come, and later `collective_seconds` in a collective. Raises UserError where
    the number of processes is not a multiple of a replica's, MachineFault where processes are missing.
    """
    global _store, _questions
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    prepare_cpu()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        _store = meet(rank, world, join_seconds) if "RANK" in os.environ else dist.HashStore()
        _questions = itertools.count()
        timeout = datetime.timedelta(seconds=collective_seconds)
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=timeout)
    if dist.get_world_size() % parallel.replica:
        world = dist.get_world_size()
        raise UserError(
            f"{world} process{'es' * (world > 1)} cannot be split into parallel.tensor * parallel.context * "
            f"parallel.pipeline = {parallel.replica}; start a multiple of that, such as by "
            f"`torchrun --nproc-per-node {parallel.replica} -m megahybrid …`."
        )
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,
        # Beside matmuls, which fill a GPU, what other streams launch comes late.
        high_priority_stream_groups=["tp"] if torch.cuda.is_available() else None,
    )
    model_parallel_cuda_manual_seed(seed)
    _places.clear()
    _places.update(tensor=tensor_parallel(), context=context_parallel())


def joined() -> bool:
    """Whether this process is in a process group."""
    return dist.is_initialized()


def shut_down() -> None:
    """Leave all groups; a later `initialize` may use another layout."""
    _places.clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """The device this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def data_parallel() -> tuple[int, int]:
    """Rank and size of this process among the data parallel replicas."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def tensor_parallel() -> tuple[int, int]:
    """Rank and size of this process among those that split its layers."""
    if found := _places.get("tensor"):
        return found
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def context_parallel() -> tuple[int, int]:
    """Rank and size of this process among those that split a micro-batch's tokens."""
    if found := _places.get("context"):
        return found
    # Without any groups, as where a plan counts parameters, Megatron-core says 0.
    return parallel_state.get_context_parallel_rank(), max(1, parallel_state.get_context_parallel_world_size())


def head_parallel() -> tuple[int, int]:
    """Rank and size of this process among those that split a mixer's heads: each tensor parallel rank's are shared by
    the context parallel ones."""
    (tensor, tensors), (context, contexts) = tensor_parallel(), context_parallel()
    return tensor * contexts + context, tensors * contexts


def weight_holders() -> tuple[int, int]:
    """Rank and size of this process among those that hold the same weights, of all replicas and context parallel ranks:
    ZeRO sums gradients and shares the optimizer over them."""
    rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return rank, parallel_state.get_data_parallel_world_size(with_context_parallel=True)


def pipeline_parallel() -> tuple[int, int]:
    """Rank and size of this process among the pipeline's."""
    return parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_world_size()


def sum_over_all(value: torch.Tensor) -> torch.Tensor:
    """`value` summed in place over all processes."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def sum_over_replicas(value: torch.Tensor) -> torch.Tensor:
    """`value` summed in place over the data parallel replicas."""
    if data_parallel()[1] > 1:
        dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return value


def max_over_all(value: int) -> int:
    """The largest `value` of all processes."""
    largest = torch.tensor(value, device=device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def some(value: bool, seconds: float | None = None) -> bool:
    """Whether `value` holds on some process; True, too, where not all have asked after `seconds`, by default those that
    a collective may take. It is none, so that it can be asked while others wait in one."""
    keys = [f"some/{next(_questions)}/{rank}" for rank in range(dist.get_world_size())]
    _store.set(keys[dist.get_rank()], str(value))
    try:
        _store.wait(keys, *([datetime.timedelta(seconds=seconds)] if seconds else []))
    except dist.DistStoreError:
        return True
    return "True" in (_store.get(key).decode() for key in keys)


def world() -> tuple[int, int]:
    """Rank and number of all processes."""
    return dist.get_rank(), dist.get_world_size()


def gather(value: Any) -> list[Any]:
    """Every process's `value`, by rank, on every process."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_tensor_parallel(part: torch.Tensor, axis: int | None, copies: int = 1) -> torch.Tensor:
    """The whole of a tensor of which every tensor parallel rank holds a part along `axis`, or all of it for None.
    `copies` neighbouring ranks hold the same part."""
    _, size = tensor_parallel()
    if axis is None or size == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts[::copies], axis)


def broadcast(value: Any) -> Any:
    """The main process's `value`, on every process: what only it can notice, all have to react to."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], Result]) -> Result:
    """What `action` gives on the main process, on every process; a UserError that it raises there is raised on all."""
    value = fault = None
    if is_main():
        try:
            value = action()
        except UserError as error:
            fault = error
    value, fault = broadcast((value, fault))
    if fault is not None:
        raise fault
    return value


def is_main() -> bool:
    """Whether this process writes the run's files."""
    return dist.get_rank() == 0
