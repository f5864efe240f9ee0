"""The mixers' states of several sequences, taken apart and put together; every tensor has the sequences in front."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megahybrid_kernels.attention import GrowingCache


def select(states: dict[int, Any], rows: Sequence[int]) -> dict[int, Any]:
    """The states of the sequences `rows` alone, in this order."""

    def pick(part: Tensor | GrowingCache) -> Tensor | GrowingCache:
        if isinstance(part, GrowingCache):
            return part.select(rows)
        return part.index_select(0, torch.tensor(rows, dtype=torch.int64, device=part.device))

    return {layer: _map(pick, state) for layer, state in states.items()}


def join(first: dict[int, Any], second: dict[int, Any]) -> dict[int, Any]:
    """The states of the sequences of `first` followed by those of `second`."""

    def lay_together(one: Tensor | GrowingCache, other: Tensor | GrowingCache) -> Tensor | GrowingCache:
        return one.join(other) if isinstance(one, GrowingCache) else torch.cat([one, other])

    return {layer: _map(lay_together, first[layer], second[layer]) for layer in first}


def advance(states: dict[int, Any], tokens: int) -> dict[int, Any]:
    """The states after `tokens` more of every sequence, with which their memory was updated in place."""

    def after(part: Tensor | GrowingCache) -> Tensor | GrowingCache:
        return part.after(tokens) if isinstance(part, GrowingCache) else part

    return {layer: _map(after, state) for layer, state in states.items()}


def room(states: dict[int, Any]) -> int | None:
    """Tokens that every sequence can get before some cache needs other memory; None where none ever does."""
    caches = [part for state in states.values() for part in _parts(state) if isinstance(part, GrowingCache)]
    return min((cache.capacity - cache.slots for cache in caches), default=None)


def take_over(states: dict[int, Any], after: dict[int, Any]) -> None:
    """Copy into the tensors of `states` what a step returned in others; no cache may have moved to other memory."""
    moved: list[tuple[Tensor, Tensor]] = []
    for layer, state in states.items():
        for old, new in zip(_parts(state), _parts(after[layer]), strict=True):
            if isinstance(old, GrowingCache):
                if old.room is not new.room:
                    raise RuntimeError("a cache has moved to other memory")
            elif old is not new:
                moved.append((old, new))
    if moved:
        torch._foreach_copy_(*map(list, zip(*moved, strict=True)))  # a few launches for all of them


def size_in_bytes(states: dict[int, Any], tokens: int | None = None) -> int:
    """Memory that the states hold on this rank, bytes; with `tokens`, the least that they will when every sequence has
    so many."""

    def size(part: Tensor | GrowingCache) -> int:
        if isinstance(part, GrowingCache):
            return part.bytes if tokens is None else part.bytes_of(tokens)
        return part.numel() * part.element_size()

    return sum(size(part) for state in states.values() for part in _parts(state))


def _map(function: Callable[..., Any], *states: Any) -> Any:
    """A state of the same form, each part of it `function` of the parts of `states`."""
    first = states[0]
    if isinstance(first, Tensor | GrowingCache):
        return function(*states)
    if isinstance(first, tuple):
        parts = [_map(function, *each) for each in zip(*states, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    names = [field.name for field in dataclasses.fields(first)]
    return type(first)(**{name: _map(function, *(getattr(state, name) for state in states)) for name in names})


def _parts(state: Any) -> Iterator[Tensor | GrowingCache]:
    if isinstance(state, Tensor | GrowingCache):
        yield state
        return
    inside = state if isinstance(state, tuple) else [getattr(state, f.name) for f in dataclasses.fields(state)]
    for each in inside:
        yield from _parts(each)
