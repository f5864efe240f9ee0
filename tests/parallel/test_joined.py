"""Weights side by side, in one process; that a model's logits stay the same: tests/inference."""

import pytest
import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from megahybrid.parallel.joined import join_weights, together
from megahybrid.parallel.layers import project
from tests.model import tiny


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


@torch.no_grad()
def test_joined_weights_keep_names_values_and_products():
    model, joined = tiny.model("GLSFN"), tiny.model("GLSFN")
    join_weights(joined)
    before, after = model.state_dict(), joined.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    mixer, x = joined.layers["0"].mixer, torch.randn(3, 1, 16, dtype=torch.float64)
    layers = mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, mixer.a_proj, mixer.b_proj
    outputs = project(x, layers, sequence_parallel=False)
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == 1
    expected = tuple(x.squeeze(1) @ layer.weight.T for layer in layers)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    # Weights that take others' place are what counts.
    mixer.k_proj.weight.data = torch.zeros_like(mixer.k_proj.weight)
    assert project(x, layers, sequence_parallel=False)[1].count_nonzero() == 0


def test_together_copies_only_what_lies_apart():
    whole = torch.arange(24.0).view(4, 6)
    one, two, three = whole.split([1, 2, 3], 1)
    with torch.no_grad():
        found = together((one, two, three), 1)
        assert torch.equal(found, whole) and found.data_ptr() == whole.data_ptr()
        for parts in ((two, one), (one, two.clone()), (one, three)):
            assert torch.equal(together(parts, 1), torch.cat(parts, 1))
    one.requires_grad_()
    (gradient,) = torch.autograd.grad(together((one, two), 1).sum(), one)
    assert torch.equal(gradient, torch.ones(4, 1))
