"""The gradients of a step, added up over micro-batches and replicas in buckets while the backward pass goes on.

A bucket's gradients lie end to end, and every replica keeps an equal piece of their sum. A bucket is reduced beside the
backward pass as soon as its last gradient has come: with ZeRO-1 that of the last micro-batch, with ZeRO-2 that of every
micro-batch, when two buckets at most are whole at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megahybrid.config.schema import ParallelConfig
from megahybrid.devices import DTYPES
from megahybrid.parallel import groups
from megahybrid_kernels.products import add_product

# Elements of gradients that a bucket lets wait for each other, to be taken at once.
_WAITING = 2**20


@dataclass(frozen=True)
class Kind:
    """What the parameters of a bucket have in common.

    Attributes:
        weight_decay: whether the optimizer decays them.
        counted: whether this rank's copy is the one that the norm of the whole model's gradient counts.
        partial: whether each tensor parallel rank has the gradient of a part of the uses.
        tied: whether the first and the last pipeline stage have a copy each.
    """

    weight_decay: bool
    counted: bool
    partial: bool
    tied: bool

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Kind:
        """That of a parameter of a stage."""
        counted = parameter.tensor_model_parallel and not getattr(parameter, "ds_pipe_replicated", False)
        return cls(parameter.spec.weight_decay, counted, parameter.partial, parameter.tied)


def in_buckets(parameters: Iterable[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Parameters of one kind each, in the order in which a backward pass comes to them; with at most so many elements
    or of one parameter."""
    filling: dict[Kind, list[nn.Parameter]] = {}
    full = []
    for parameter in reversed(list(parameters)):
        bucket = filling.setdefault(Kind.of(parameter), [])
        if bucket and sum(each.numel() for each in bucket) + parameter.numel() > most:
            full.append(bucket)
            bucket = filling[Kind.of(parameter)] = []
        bucket.append(parameter)
    return full + list(filling.values())


def travelling(config: ParallelConfig) -> torch.dtype:
    """In which type gradients travel between replicas."""
    return DTYPES[config.gradient_reduction]


def has_sums(parameters: Sequence[nn.Parameter], zero_stage: int) -> bool:
    """Whether a bucket keeps whole sums of all micro-batches. Those of partial gradients, which are few, always are."""
    return zero_stage == 1 or parameters[0].partial


class Bucket:
    """Parameters whose gradients are reduced at once.

    Attributes:
        parameters: of one kind, in the order in which their gradients lie.
        kind: theirs.
        shard: `[length / replicas]`, this rank's piece of the sum; zero beyond the last parameter's.
        missing: of how many gradients the last part is still to come before it is reduced.
        reduced: whether it was, in this step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], shard: Tensor, sums: Tensor | None = None):
        """`sums` `[length]`, of which `shard` is this rank's piece, takes the gradients of all micro-batches. Without
        it those of each one have a place for a while, and `shard` takes what they add up to."""
        self.parameters, self.kind, self.shard, self.sums = parameters, Kind.of(parameters[0]), shard, sums
        self._parts: list[Tensor] = []
        self._filled: set[int] = set()
        self._waiting: dict[int, Tensor] = {}
        self._room = _WAITING

    def begin(self, micro_batches: int) -> None:
        """A step of so many micro-batches."""
        self._expected = len(self.parameters) * (micro_batches if self.sums is not None else 1)
        self.missing, self.reduced = self._expected, False
        if self.sums is None:
            self.shard.zero_()

    @property
    def waiting(self) -> bool:
        """Whether it has gradients that are not reduced, or had none in this step."""
        return bool(self._filled or self._waiting) or not self.reduced

    def put(self, number: int, gradient: Tensor, dtype: torch.dtype) -> None:
        """Add a parameter's gradient, in `dtype` where it has its place for a while. Small ones wait until there are
        several, since most are a launch's worth of nothing; of what is a part of something larger, which the backward
        pass may yet change, none does."""
        self._open(dtype)
        if number in self._waiting:
            self._take_in()
        self._waiting[number] = gradient = gradient.reshape(-1)
        self._room -= gradient.numel()
        if self._room < 0 or gradient.untyped_storage().nbytes() != gradient.nbytes:
            self._take_in()

    def _take_in(self) -> None:
        """Add the gradients that wait: one launch for all that are the first of their parameters."""
        waiting, self._waiting, self._room = self._waiting, {}, _WAITING
        for add in (False, True):
            if numbers := [number for number in waiting if (number in self._filled) is add]:
                parts, gradients = [self._parts[n] for n in numbers], [waiting[n] for n in numbers]
                torch._foreach_add_(parts, gradients) if add else torch._foreach_copy_(parts, gradients)
        self._filled.update(waiting)

    def put_product(self, number: int, dy: Tensor, x: Tensor, dtype: torch.dtype) -> None:
        """Likewise that of a weight, dyᵀ x, which the product itself adds."""
        self._open(dtype)
        if number in self._waiting:
            self._take_in()
        add_product(self._parts[number].view(dy.shape[1], x.shape[1]), dy.T, x, number in self._filled)
        self._filled.add(number)

    def _open(self, dtype: torch.dtype) -> None:
        if self.reduced and self.sums is not None:
            raise RuntimeError("A gradient came after the last one of its step.")
        if not self._parts:
            length = len(self.shard) * groups.weight_holders()[1]
            whole = self.shard.new_empty(length, dtype=dtype) if self.sums is None else self.sums
            sizes = [parameter.numel() for parameter in self.parameters]
            *self._parts, rest = whole.split([*sizes, length - sum(sizes)])
            rest.zero_()
            self._whole = whole

    def take(self, dtype: torch.dtype) -> Tensor:
        """`[length]`, the gradients that came, and zeros for others."""
        self._open(dtype)
        self._take_in()
        for number in set(range(len(self._parts))) - self._filled:
            self._parts[number].zero_()
        whole, self._whole, self._parts = self._whole, None, []
        self._filled.clear()
        self.missing, self.reduced = self._expected, True
        return whole

    def receive(self, piece: Tensor) -> None:
        """Take this rank's piece of what the replicas add up to."""
        if self.sums is None:
            self.shard.add_(piece)
        elif piece is not self.shard:
            self.shard.copy_(piece)


@dataclass(frozen=True)
class _UnderWay:
    """What is done with a bucket once its reduction is: `given` is kept until then."""

    bucket: Bucket
    given: Tensor
    piece: Tensor
    work: dist.Work

    def finish(self) -> None:
        self.work.wait()
        self.bucket.receive(self.piece)


class Reduction:
    """Takes every gradient that a backward pass leaves on a parameter of its buckets, or gives it as a product.

    Attributes:
        buckets: as they were given.
    """

    def __init__(self, buckets: Sequence[Bucket], dtype: torch.dtype):
        """`dtype` is that in which gradients travel between replicas."""
        _, self._replicas = groups.weight_holders()
        self.buckets, self._dtype = buckets, dtype if self._replicas > 1 else buckets[0].shard.dtype
        self._under_way: list[_UnderWay] = []
        for parameter in itertools.chain.from_iterable(bucket.parameters for bucket in buckets):
            parameter.partial = False  # this sums its gradient, the backward pass need not
        self._hooks = list(self._hooked())

    def _hooked(self) -> Iterator[RemovableHandle]:
        for bucket in self.buckets:
            for number, parameter in enumerate(bucket.parameters):
                parameter.add_product = functools.partial(self._take_product, bucket, number)
                yield parameter.register_post_accumulate_grad_hook(functools.partial(self._take, bucket, number))

    def stop(self) -> None:
        """Leave gradients to the backward pass again."""
        for hook in self._hooks:
            hook.remove()
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.add_product, parameter.partial = None, bucket.kind.partial

    def begin(self, micro_batches: int) -> None:
        """Call before the passes of a step."""
        for bucket in self.buckets:
            bucket.begin(micro_batches)

    def _take(self, bucket: Bucket, number: int, parameter: nn.Parameter) -> None:
        """Called once a backward pass, in which gradients are off, when all uses of a parameter have given theirs; also
        where all were products."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            bucket.put(number, gradient, self._dtype)
        bucket.missing -= 1
        if not bucket.missing and not bucket.kind.partial:
            self._reduce(bucket)

    def _take_product(self, bucket: Bucket, number: int, dy: Tensor, x: Tensor) -> None:
        bucket.put_product(number, dy, x, self._dtype)

    def _reduce(self, bucket: Bucket) -> None:
        """Called in the same order on all replicas, whose graphs are the same."""
        whole = bucket.take(self._dtype)
        if bucket.kind.partial:
            dist.all_reduce(whole, group=parallel_state.get_tensor_model_parallel_group())
        if self._replicas == 1:
            bucket.receive(bucket.shard if bucket.sums is not None else whole)
            return
        given, piece = whole, bucket.shard
        if bucket.sums is None or whole.dtype != self._dtype:
            self._wait()  # one buffer that comes and goes is in flight at a time
            given = whole.to(self._dtype)
            piece = given.new_empty(len(bucket.shard))
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        work = dist.reduce_scatter_tensor(piece, given, group=group, async_op=True)
        self._under_way.append(_UnderWay(bucket, given, piece, work))

    def _wait(self) -> None:
        for each in self._under_way:
            each.finish()
        self._under_way.clear()

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Call after the passes of a step: the shards are whole on the device by then. The sum of squares of what this
        rank counts, float64."""
        for bucket in self.buckets:
            if bucket.waiting:
                self._reduce(bucket)
        self._wait()
        for bucket in self.buckets:
            if bucket.kind.tied:  # after the replicas': of two summands copies are equal to the last bit
                dist.all_reduce(bucket.shard, group=parallel_state.get_embedding_group())
        counted = [bucket.shard for bucket in self.buckets if bucket.kind.counted]
        if not counted:
            return self.buckets[0].shard.new_zeros((), dtype=torch.float64)
        # Sums in float64 without a copy, on a GPU.
        return torch.stack(torch._foreach_norm(counted, 2, torch.float64)).square().sum()
