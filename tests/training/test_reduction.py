"""What a bucket takes from backward passes is what autograd finds."""

import pytest
import torch
from torch import nn

from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from megahybrid.parallel.layers import ColumnLinear, project
from megahybrid.parallel.parameters import normal
from megahybrid.training.reduction import Bucket, Reduction
from tests.training.overlap import engine_of

MICRO_BATCHES = 2


@pytest.fixture
def layers():
    groups.initialize(ParallelConfig())
    torch.manual_seed(0)
    layers = [ColumnLinear(6, 6, normal(1)) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.weight)
    yield layers
    groups.shut_down()


def loss(layers, number):
    """The second layer is used twice, the third once as a projection and once otherwise."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
    for layer in (*layers, layers[1]):
        (x,) = project(torch.tanh(x)[:, None], [layer], sequence_parallel=False)
    return (x @ layers[2].weight).square().sum()


@pytest.mark.parametrize("by_micro_batch", [False, True])
def test_a_weight_may_be_used_twice_in_a_pass(by_micro_batch, layers, monkeypatch):
    weights = [layer.weight for layer in layers]
    gradients = torch.autograd.grad(sum(loss(layers, number) for number in range(MICRO_BATCHES)), weights)
    expected = torch.cat([each.view(-1) for each in gradients])
    sums = torch.full((3 * 36,), torch.nan)
    bucket = Bucket(weights, torch.zeros_like(sums)) if by_micro_batch else Bucket(weights, sums, sums)
    reduction, reduced = Reduction([bucket], torch.float32), []
    monkeypatch.setattr(bucket, "receive", lambda piece, receive=bucket.receive: (reduced.append(1), receive(piece)))
    for _ in range(2):
        reduction.begin(MICRO_BATCHES)
        for number in range(MICRO_BATCHES):
            loss(layers, number).backward()
        times = len(reduced)
        squares = reduction.finish()
        torch.testing.assert_close(bucket.shard, expected)
        torch.testing.assert_close(squares, expected.double().square().sum())
        assert times == len(reduced)  # all beside the passes
    assert len(reduced) == 2 * (MICRO_BATCHES if by_micro_batch else 1)
    assert all(weight.grad is None for weight in weights)
    reduction.stop()
    sum(loss(layers, number) for number in range(MICRO_BATCHES)).backward()
    torch.testing.assert_close([weight.grad for weight in weights], list(gradients))


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_small_gradients_wait_for_each_other(room, layers, monkeypatch):
    """Whichever wait, they are added in the order in which they come, products between them."""
    monkeypatch.setattr("megahybrid.training.reduction._WAITING", 36 * room)
    bucket = Bucket([layer.weight for layer in layers], torch.zeros(3 * 36))
    bucket.begin(2)
    draw, launches = torch.Generator().manual_seed(0), []
    for name in ("_foreach_copy_", "_foreach_add_"):
        take = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *lists, take=take: (launches.append(len(lists[0])), take(*lists)))
    for _ in range(2):
        expected = torch.zeros(3, 6, 6)
        for number, product in ((1, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (2, 0), (2, 0), (1, 0)):
            x = torch.randn(6, 6, generator=draw)
            x = x if product else x.bfloat16().float()
            if product:
                bucket.put_product(number, x, torch.eye(6), torch.float32)
            else:
                bucket.put(number, x.bfloat16(), torch.float32)
            expected[number] += x.T if product else x
            assert bucket.waiting
        assert torch.equal(bucket.take(torch.float32), expected.flatten())
        assert not bucket.waiting
    assert sum(launches) == 12 and max(launches) <= room + 1 and (room < 2 or max(launches) > 1)


def left_of(stage):
    """In a worker: what an owner of gradients that was destroyed leaves on the model's parameters."""
    engine, _ = engine_of("bf16", {"zero_stage": stage})
    engine.zero.destroy()
    return [(each.add_product, list(each._post_accumulate_grad_hooks.values())) for each in engine.model.parameters()]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_destroyed_owner_takes_no_gradients(stage, workers):
    (left,) = workers.run(1, "tests.training.test_reduction:left_of", stage)
    assert left and all(each == (None, []) for each in left)
