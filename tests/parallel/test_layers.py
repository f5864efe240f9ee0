"""Projections that share their input, in one process, and weights that all ranks share."""

import pytest
import torch
import torch.nn.functional as F

from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from megahybrid.parallel.layers import ColumnLinear, project, shared
from megahybrid.parallel.parameters import normal
from tests.workers import Workers


@pytest.fixture
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


def test_gradients_of_a_shared_input_are_those_of_separate_projections(process_group):
    layers = [ColumnLinear(12, width, normal(0.1)).double() for width in (8, 3, 20)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
    x = torch.randn(5, 1, 12, dtype=torch.float64, requires_grad=True)
    weights = [layer.weight for layer in layers]

    def gradients(outputs):
        # The last output is not used.
        loss = outputs[0].square().sum() + outputs[1].sin().sum()
        return torch.autograd.grad(loss, [x, *weights], materialize_grads=True)

    separate = [F.linear(x.squeeze(1), weight) for weight in weights]
    torch.testing.assert_close(gradients(project(x, layers, sequence_parallel=False)), gradients(separate))
    with torch.no_grad():
        torch.testing.assert_close(project(x, layers, sequence_parallel=False), tuple(separate))


@pytest.fixture
def workers():
    pool = Workers(4)
    yield pool
    pool.close()


def shared_gradient(dtype):
    """Of four ranks, where rank i gives 1 to the i-th entry and 2⁻⁹ to the others."""
    groups.initialize(ParallelConfig(tensor=4))
    weight = torch.zeros(4, dtype=getattr(torch, dtype), requires_grad=True)
    given = torch.full_like(weight, 2**-9)
    given[groups.tensor_parallel()[0]] = 1
    shared(weight).backward(given)
    return weight.grad


def test_a_shared_weights_gradient_is_summed_in_fp32(workers):
    """In bf16, 1 + 2⁻⁹ is 1, and with the sum's order some entry would end at that or the next number."""
    for dtype, expected in (("float64", 1 + 3 * 2**-9), ("bfloat16", 1 + 2**-7)):
        for gradient in workers.run(4, "tests.parallel.test_layers:shared_gradient", dtype):
            assert gradient.dtype == getattr(torch, dtype) and gradient.tolist() == [expected] * 4
