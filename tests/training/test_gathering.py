"""ZeRO-3's layers: whole where they are used, the next one on its way, two at a time."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


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


def passes(count, recomputed):
    """In a worker, for `count` split layers and a whole one behind the first, twice with other values: which split
    layers have memory in forward and backward passes, in their order; the distance of gradients from those without
    gathering; how many bytes are left after `forget`; where the whole layer's weight lies."""
    from megahybrid.config.schema import ParallelConfig
    from megahybrid.parallel import groups
    from megahybrid.training.gathering import Gathering, Weights

    groups.initialize(ParallelConfig())
    torch.manual_seed(0)
    found, split = [], []

    def held():
        return {n for n, each in enumerate(split) if each.whole.untyped_storage().nbytes()}

    layers = [Layer(lambda number=number: found.append((number, held()))) for number in range(count)]
    layers.insert(1, Layer(lambda: None))
    x, parameters = torch.randn(3, 7, requires_grad=True), [layer.weight for layer in layers]
    values = [[torch.randn(7, 7) for _ in layers] for _ in range(2)]
    expected = [gradients_at(each, layers, x) for each in values]
    weights = [Weights([weight], split=number != 1) for number, weight in enumerate(parameters)]
    split += [*weights[:1], *weights[2:]]
    gathering, notes = Gathering([(layers[n + (n > 0)], [each]) for n, each in enumerate(split)]), []
    for theirs, gradients in zip(values, expected, strict=True):
        for each, value in zip(weights, theirs, strict=True):
            each.piece.copy_(piece_of(value, len(each.piece), *groups.weight_holders()))
        weights[1].gather()
        weights[1].wait()
        found.clear()
        with torch.autograd.set_multithreading_enabled(False):
            for _ in range(2):
                run(layers, x, recomputed).backward()
            with torch.no_grad():
                run(layers, x, ())
            run(layers, x, ())
        off = [weight.grad / 2 - each for weight, each in zip(parameters, gradients, strict=True)]
        for weight in parameters:
            weight.grad = None
        gathering.forget()
        notes.append((list(found), max(float(each.abs().max()) for each in off), held(), parameters[1].data_ptr()))
    return notes


def gradients_at(values, layers, x):
    for layer, value in zip(layers, values, strict=True):
        layer.weight.data.copy_(value)
    return torch.autograd.grad(run(layers, x, ()), [layer.weight for layer in layers])


def piece_of(value, size, rank, holders):
    return nn.functional.pad(value.view(-1), (0, size * holders - value.numel()))[rank * size : (rank + 1) * size]


def run(layers, x, recomputed):
    for number, layer in enumerate(layers):
        y, x, _ = checkpoint(layer, x, use_reentrant=True) if number in recomputed else layer(x)
        x = x + y
    return x.square().sum()


@pytest.mark.parametrize(("count", "recomputed"), [(1, ()), (2, (0,)), (5, ()), (5, (3,)), (5, range(6))], ids=str)
def test_layers_are_whole_where_they_are_used_and_the_next_one_is_on_its_way(count, recomputed, workers):
    last = count - 1
    up = [*((n, {n, n + 1}) for n in range(last)), (last, {last, max(0, last - 1)})]
    down = [*((n, {n, n - 1}) for n in range(last, 0, -1)), (0, {0, min(1, last)})]
    again = [each for each in down for _ in range(1 + (each[0] + (each[0] > 0) in recomputed))]
    for notes in workers.run(2, "tests.training.test_gathering:passes", count, recomputed):
        for found, off, left, _ in notes:
            assert found == [*up, *again, *up, *again, *up, *up]
            assert off < 1e-4 and not left
        (_, _, _, before), (_, _, _, after) = notes
        assert before == after
