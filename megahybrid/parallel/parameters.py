"""What is known of every parameter: full shape, shard axis, initial value, weight decay.

This table is the one source for initialisation, weight decay, checkpoints and export. A parameter is initialised in
full from (seed, global name) and then sliced, so its value does not depend on the layout.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

_DRAWN_AT_ONCE = 16
Initializer = Callable[[tuple[int, ...], torch.Generator], Tensor]
Place = Callable[[nn.Parameter], tuple[int, Tensor]]
"""Where this process keeps what it holds of a parameter's value: the number of the first element in this tensor
parallel rank's part, laid flat, and the elements from there on, `[n]`, to be written to."""


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as the whole model sees it.

    Attributes:
        shape: full shape, over all tensor parallel ranks.
        axis: the axis that tensor parallel ranks split, or None when every rank holds the whole.
        initializer: makes the full float32 value from shape and generator.
        weight_decay: whether the optimizer decays it.
        parts: into how many parts `axis` splits at most; with more ranks, neighbouring ones hold the same part.
    """

    shape: tuple[int, ...]
    axis: int | None
    initializer: Initializer
    weight_decay: bool
    parts: int | None = None

    @property
    def full_size(self) -> int:
        """Number of elements over all tensor parallel ranks."""
        return math.prod(self.shape)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """The shape that one of `size` tensor parallel ranks holds."""
        parts = size // self.copies(size)
        return tuple(n // parts if i == self.axis else n for i, n in enumerate(self.shape))

    def copies(self, size: int) -> int:
        """How many neighbouring ones of `size` tensor parallel ranks hold the same part."""
        if self.axis is None:
            return size
        return 1 if self.parts is None else max(1, size // self.parts)

    def place(self, rank: int, size: int) -> tuple[int, int]:
        """Which part tensor parallel rank `rank` of `size` holds, and of how many."""
        copies = self.copies(size)
        return rank // copies, size // copies

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The part of the full tensor that tensor parallel rank `rank` of `size` holds."""
        part, parts = self.place(rank, size)
        return full if self.axis is None else full.chunk(parts, self.axis)[part]


def parameter(
    *shape: int,
    axis: int | None = None,
    initializer: Initializer,
    weight_decay: bool = True,
    parts: int | None = None,
    partial: bool = False,
) -> nn.Parameter:
    """An uninitialised parameter: this rank's part of `shape`, with its spec attached as `.spec`. `partial`: every
    tensor parallel rank has the whole but sees only a part of the uses, so that `layers.shared` must sum its gradient.
    """
    spec = ParameterSpec(shape, axis, initializer, weight_decay, parts)
    size = parallel_state.get_tensor_model_parallel_world_size()
    _, held = spec.place(0, size)
    if size % held or (axis is not None and (parts or shape[axis]) % held):
        raise ValueError(f"axis {axis} of shape {shape} does not split over {size} tensor parallel ranks")
    return attach_spec(nn.Parameter(torch.empty(spec.local_shape(size))), spec, partial and size > 1)


def attach_spec(weight: nn.Parameter, spec: ParameterSpec, partial: bool = False) -> nn.Parameter:
    """Tag a parameter that was made elsewhere (a Megatron-core layer's)."""
    weight.spec, weight.partial, weight.tied = spec, partial, False
    rank = parallel_state.get_tensor_model_parallel_rank()
    copies = spec.copies(parallel_state.get_tensor_model_parallel_world_size())
    weight.tensor_model_parallel = rank % copies == 0  # counted by training/reduction.py, once a part
    return weight


def materialize(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Make the parameters of a model on the meta device where they belong, without values."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            made = nn.Parameter(torch.empty_like(weight, device=device, dtype=dtype))
            vars(made).update(vars(weight))
            setattr(module, name, made)


def whole(weight: nn.Parameter) -> tuple[int, Tensor]:
    """The `Place` of a model that no optimizer owns: all of the weight itself."""
    return 0, weight.data.view(-1)


def initialize_parameters(model: nn.Module, seed: int, place: Place = whole) -> None:
    """Give every parameter its initial value from (seed, global name). One that has no part here is not drawn."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()

    def draw(name: str, weight: nn.Parameter) -> None:
        begin, held = place(weight)
        if not len(held):
            return
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        full = weight.spec.initializer(weight.spec.shape, generator)
        held.copy_(weight.spec.shard(full, rank, size).reshape(-1)[begin : begin + len(held)])

    # A generator draws on one core, and each parameter has its own; so many whole ones are in host memory at a time.
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max(1, min(cores, _DRAWN_AT_ONCE))) as pool:
        list(pool.map(draw, *zip(*model.named_parameters(), strict=True)))


def normal(std: float) -> Initializer:
    """N(0, std²)."""
    return lambda shape, generator: torch.randn(shape, generator=generator).mul_(std)


def constant(value: float) -> Initializer:
    """The same value everywhere."""
    return lambda shape, generator: torch.full(shape, value)


def uniform(low: float, high: float) -> Initializer:
    """U(low, high)."""
    return lambda shape, generator: torch.rand(shape, generator=generator) * (high - low) + low


def kaiming_normal(fan_in: int) -> Initializer:
    """N(0, 2 / fan_in), as for a layer before a rectifier (He et al. 2015)."""
    return normal(math.sqrt(2 / fan_in))
