"""Projections that share their input, in one process."""

import pytest
import torch
import torch.nn.functional as F

from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from megahybrid.parallel.layers import ColumnLinear, RowLinear, project
from megahybrid.parallel.parameters import normal


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


@pytest.mark.parametrize("widths", [(8, 3, 20), (20, 3, 8), (20, 3, 2), (3, 8, 2)])
def test_gradients_of_a_shared_input_are_those_of_separate_projections(widths):
    """The last ones are one product where they are as narrow as 16."""
    layers = [ColumnLinear(12, width, normal(0.1)).double() for width in widths]
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


def test_a_weights_owner_may_take_its_gradient_as_a_product():
    layers = [ColumnLinear(6, 3, normal(0.1)), RowLinear(3, 6, normal(0.1), sequence_parallel=False)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
    x, taken = torch.randn(5, 1, 6), {}

    def gradients():
        (y,) = project(x, layers[:1], sequence_parallel=False)
        layers[1](y).square().sum().backward()
        return [layer.weight.grad for layer in layers]

    expected = gradients()
    for number, layer in enumerate(layers):
        layer.weight.grad = None
        layer.weight.add_product = lambda dy, x, number=number: taken.update({number: dy.T @ x})
    assert gradients() == [None, None]
    torch.testing.assert_close([taken[0], taken[1]], expected)
