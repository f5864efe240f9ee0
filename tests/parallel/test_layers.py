"""Projections that share their input, in one process."""

import torch
import torch.nn.functional as F

from megahybrid.config import load_config
from megahybrid.parallel import groups
from megahybrid.parallel.layers import ColumnLinear, project
from megahybrid.parallel.parameters import normal


def test_gradients_of_a_shared_input_are_those_of_separate_projections():
    config = load_config("recipes/quickstart.yaml")
    groups.initialize(config.parallel, config.train.seed)
    layers = [ColumnLinear(12, width, normal(0.1)).double() for width in (8, 3, 20)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
    x = torch.randn(5, 1, 12, dtype=torch.float64, requires_grad=True)
    weights = [layer.weight for layer in layers]

    def gradients(outputs):
        # The last output is not used.
        loss = outputs[0].square().sum() + outputs[1].sin().sum()
        return torch.autograd.grad(loss, [x, *weights], materialize_grads=True)

    expected = gradients([F.linear(x, weight) for weight in weights])
    torch.testing.assert_close(gradients(project(x, *layers)), expected)
    with torch.no_grad():
        torch.testing.assert_close(project(x, *layers), tuple(F.linear(x, weight) for weight in weights))
