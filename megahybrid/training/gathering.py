"""Working copies of which every replica keeps a piece: those of a layer are whole while it is used (ZeRO-3).

A layer's copies are gathered beside the layer that is used before it, so that two layers are whole at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megahybrid.parallel import groups

_ALIGNED = 64  # elements to whose multiples pieces are padded: 128 bytes


class Weights:
    """The working copies of some parameters, end to end, of which this rank keeps a piece.

    Attributes:
        parameters: views of `whole` from now on.
        whole: `[length]`, zero beyond the last parameter's; without memory where it is split and not gathered.
        piece: `[length / weight holders]`, of `whole` itself where that is not split.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], split: bool):
        rank, holders = groups.weight_holders()
        sizes = [parameter.numel() for parameter in parameters]
        piece = -(-sum(sizes) // (holders * _ALIGNED)) * _ALIGNED
        self.parameters, self.whole = list(parameters), parameters[0].new_zeros(holders * piece)
        for parameter, part in zip(parameters, self.whole.split([*sizes, len(self.whole) - sum(sizes)]), strict=False):
            parameter.data = part.view(parameter.shape)
        self.piece = self.whole[rank * piece : (rank + 1) * piece]
        self._bytes, self._work = self.whole.untyped_storage().nbytes(), None
        if split:
            self.piece = self.piece.clone()
            self.free()

    def gather(self) -> None:
        """Begin to make `whole` of all ranks' pieces; a collective."""
        storage = self.whole.untyped_storage()
        if not storage.nbytes():  # or all would be copied to a new place
            storage.resize_(self._bytes)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._work = dist.all_gather_into_tensor(self.whole, self.piece, group=group, async_op=True)

    def wait(self) -> None:
        """Until what `gather` began has ended, on the device."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def free(self) -> None:
        """Give back the memory of `whole`."""
        self.wait()
        self.whole.untyped_storage().resize_(0)


class Gathering:
    """Gathers the weights of split layers when a forward or backward pass comes to them, or to the layer before."""

    def __init__(self, layers: Sequence[tuple[nn.Module, Sequence[Weights]]]):
        """`layers` in the order of the forward pass, each with its weights, which are split."""
        self._weights = [weights for _, weights in layers]
        self._gathered: set[int] = set()  # or on the way
        self._at: int | None = None
        self._hooks = []
        for number, (layer, _) in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(functools.partial(self._enter, number)))
            self._hooks.append(layer.register_forward_hook(functools.partial(self._after, number)))

    def _after(self, number: int, layer: nn.Module, given: Any, outputs: Sequence[Any]) -> None:
        for output in outputs:
            if isinstance(output, Tensor) and output.requires_grad:  # whose gradient the backward pass has first
                output.register_hook(functools.partial(self._enter, number))

    @torch.no_grad()
    def _enter(self, number: int, *_: Any) -> None:
        if number == self._at:
            return
        ahead = self._ahead(number)
        for other in self._gathered - {number, ahead}:
            self._free(other)
        self._gather(number)
        for weights in self._weights[number]:
            weights.wait()
        self._gather(ahead)
        self._at = number

    def _ahead(self, number: int) -> int:
        """The layer after this one: passes go up and down in turns, and one is recomputed on the way down."""
        last = len(self._weights) - 1
        if number in (0, last):
            return min(1, last) if number == 0 else last - 1
        return number + 1 if self._at is None or self._at < number else number - 1

    def _gather(self, number: int) -> None:
        if number not in self._gathered:
            self._gathered.add(number)
            for weights in self._weights[number]:
                weights.gather()

    def _free(self, number: int) -> None:
        self._gathered.remove(number)
        for weights in self._weights[number]:
            weights.free()

    def forget(self) -> None:
        """Free all, since pieces are to have other values."""
        for number in list(self._gathered):
            self._free(number)
        self._at = None

    def stop(self) -> None:
        """Free all, and gather no more."""
        self.forget()
        for hook in self._hooks:
            hook.remove()
