"""How many launches a layer takes in prefill and decode, counted without a GPU: none may join them unseen."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megahybrid.config import load_config
from megahybrid.model.context import Context
from megahybrid.model.stack import build_stages
from megahybrid.parallel.joined import join_weights
from megahybrid_kernels import Sequences
from megahybrid_kernels.launch import Kernel
from tests.doctor.launched import kernels_without_memory

TOKENS = 4096


class Launches(TorchDispatchMode):
    """Counts kernels, which compute nothing, and torch's ops that are neither views nor bare memory."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()
        getitem = lambda kernel, _: lambda *arguments, **options: self.found.update([kernel.name])  # noqa: E731
        self._patch = mock.patch.object(Kernel, "__getitem__", getitem)

    def __enter__(self):
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *raised):
        self._patch.stop()
        return super().__exit__(*raised)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name, returns = function.overloadpacket.__name__, function._schema.returns
        view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        if not view and not name.startswith(("empty", "new_empty", "_unsafe_view", "promote_types")):
            self.found[name] += 1
        return function(*arguments, **(options or {}))


@torch.no_grad()
def launches_of(pattern: str, joined: bool = True) -> list[Counter]:
    """Of a prompt's prefill, and of the second token after it."""
    config = load_config("recipes/lalte-1.4b.yaml", [f"model.pattern={pattern}"])
    (model,) = build_stages(config, [None], "meta", torch.bfloat16)
    if joined:
        join_weights(model)
    states, read, counted = None, 0, []
    with kernels_without_memory():
        for count in (TOKENS, 1, 1):
            starts = torch.full((1,), read, device="meta") if read else None
            tokens = torch.zeros(count, dtype=torch.int64, device="meta")
            context = Context(Sequences.of((count,), "meta", starts), keep_states=True, in_place=True)
            with Launches() as launches:
                states = model(tokens, context, states=states).states
            counted.append(launches.found)
            read += count
    return [counted[0], counted[2]]


# What is not a kernel of ours: products.
@pytest.mark.parametrize("letter, prefill, decode", [("G", 11, 6), ("L", 23, 8), ("N", 20, 9)])
def test_launches_of_a_layer(letter, prefill, decode):
    one, two = launches_of(letter), launches_of(2 * letter)
    more = [two - one for two, one in zip(two, one, strict=True)]
    assert [each.total() for each in more] == [prefill, decode], more


def test_what_is_not_joined_takes_more():
    launches_of("G")  # makes what layers share
    apart, joined = (launches_of("G", joined)[0] for joined in (False, True))
    assert apart["mm"] - joined["mm"] == 5 and apart["cat"] - joined["cat"] == 3
