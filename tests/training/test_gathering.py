"""ZeRO-3's layers: whole where they are used, the next one on its way, two at a time."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

LAYERS = 5


class Layer(nn.Module):
    """x + tanh(x W), with a second output, as a block has."""

    def __init__(self, note):
        super().__init__()
        self.weight, self.note = nn.Parameter(torch.randn(7, 7)), note

    def forward(self, x):
        self.note()
        return torch.tanh(_Noted.apply(x, self.note) @ self.weight), x + 0, None


class _Noted(torch.autograd.Function):
    """Notes that the backward pass is in a layer, behind its product."""

    @staticmethod
    def forward(ctx, x, note):
        ctx.note = note
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.note()
        return grad, None


def passes(recomputed):
    """In a worker: which layers have memory in forward and backward passes, in their order; the distance of gradients
    from those without gathering; how many bytes are left after `forget`."""
    from megahybrid.config.schema import ParallelConfig
    from megahybrid.parallel import groups
    from megahybrid.training.gathering import Gathering, Weights

    groups.initialize(ParallelConfig())
    torch.manual_seed(0)
    found, weights = [], []

    def held():
        return {n for n, each in enumerate(weights) if each.whole.untyped_storage().nbytes()}

    layers = [Layer(lambda number=number: found.append((number, held()))) for number in range(LAYERS)]
    x, values = torch.randn(3, 7, requires_grad=True), [layer.weight.detach().clone() for layer in layers]
    expected = torch.autograd.grad(run(layers, x, ()), [layer.weight for layer in layers])
    found.clear()
    weights += [Weights([layer.weight], split=True) for layer in layers]
    rank, holders = groups.weight_holders()
    for each, value in zip(weights, values, strict=True):
        size = len(each.piece)
        each.piece.copy_(nn.functional.pad(value.view(-1), (0, size * holders - 49))[rank * size : (rank + 1) * size])
    gathering = Gathering([(layer, [each]) for layer, each in zip(layers, weights, strict=True)])
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(2):
            run(layers, x, recomputed).backward()
        with torch.no_grad():
            run(layers, x, ())
        run(layers, x, ())
    off = max(float((layer.weight.grad / 2 - grad).abs().max()) for layer, grad in zip(layers, expected, strict=True))
    gathering.forget()
    return found, off, held()


def run(layers, x, recomputed):
    for number, layer in enumerate(layers):
        y, x, _ = checkpoint(layer, x, use_reentrant=True) if number in recomputed else layer(x)
        x = x + y
    return x.square().sum()


@pytest.mark.parametrize("recomputed", [(), (2,), range(LAYERS)], ids=str)
def test_layers_are_whole_where_they_are_used_and_the_next_one_is_on_its_way(recomputed, workers):
    up = [(0, {0, 1}), (1, {1, 2}), (2, {2, 3}), (3, {3, 4}), (4, {4, 3})]
    down = [(4, {4, 3}), (3, {3, 2}), (2, {2, 1}), (1, {1, 0}), (0, {0, 1})]
    again = [each for each in down for _ in range(1 + (each[0] in recomputed))]
    for found, off, left in workers.run(2, "tests.training.test_gathering:passes", recomputed):
        assert found == [*up, *again, *up, *again, *up, *up]
        assert off < 1e-6 and not left
