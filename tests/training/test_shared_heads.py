"""More tensor parallel ranks than parts of a parameter: neighbours hold the same part, for other query heads."""

import re

import pytest
import torch

from megahybrid.parallel.parameters import ParameterSpec, constant
from tests.training.conftest import RECIPE, metrics

RANKS = 4
SHARED = re.compile(r"[12]\.mixer\.[kv]_proj")


def run(workers, world, function, *arguments):
    return workers.run(world, f"tests.training.shared_heads:{function}", *arguments)


@pytest.mark.parametrize(
    ("axis", "parts", "size", "places"),
    [
        (1, None, 3, [(0, 3), (1, 3), (2, 3)]),
        (1, 2, 1, [(0, 1)]),
        (1, 2, 2, [(0, 2), (1, 2)]),
        (1, 2, 6, [(0, 2)] * 3 + [(1, 2)] * 3),
        (None, None, 3, [(0, 1)] * 3),
    ],
)
def test_a_spec_says_who_holds_what(axis, parts, size, places):
    spec = ParameterSpec((4, 6), axis, constant(0), True, parts)
    full = torch.arange(24).view(4, 6)
    assert [spec.place(rank, size) for rank in range(size)] == places
    held = [spec.shard(full, rank, size) for rank in range(size)]
    assert {tuple(part.shape) for part in held} == {spec.local_shape(size)}
    firsts = held[:: spec.copies(size)]
    assert torch.equal(firsts[0] if axis is None else torch.cat(firsts, axis), full)


@pytest.mark.parametrize(("kv_heads", "tensor", "sequence"), [(2, 4, False), (2, 4, True), (1, 4, True)])
def test_every_gradient_is_one_processs(kv_heads, tensor, sequence, workers):
    ((_, expected),) = run(workers, 1, "gradients", kv_heads, {})
    ranks = run(workers, tensor, "gradients", kv_heads, {"tensor": tensor, "sequence": sequence})
    for name, gradient in expected.items():
        for _, whole in ranks:
            assert (whole[name] - gradient).abs().max() < 1e-11 * gradient.abs().max(), name
    assert_copies_are_equal([parts for parts, _ in ranks], kv_heads)


@pytest.mark.parametrize(
    ("kv_heads", "parallel"),
    [
        (2, {"tensor": 4, "sequence": True}),
        (1, {"tensor": 2, "sequence": True, "zero_stage": 3}),  # of two replicas
        pytest.param(2, {"tensor": 4, "zero_stage": 2}, marks=pytest.mark.slow),
        pytest.param(1, {"tensor": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_steps_are_one_processs(kv_heads, parallel, workers):
    """Clipped by a norm in which every part counts once."""
    ((expected, theirs, _),) = run(workers, 1, "steps", kv_heads, "fp32", {})
    assert min(expected["norms"]) > 2 * 0.3  # or nothing is clipped
    ranks = run(workers, RANKS, "steps", kv_heads, "fp32", parallel)
    assert_one_processs(ranks, expected, theirs)
    assert_copies_are_equal([parts for _, _, parts in ranks[: parallel["tensor"]]], kv_heads)


@pytest.mark.slow
def test_a_stage_may_have_nothing_to_share(workers):
    """Its ranks then sum nothing while others do."""
    ((expected, theirs, _),) = run(workers, 1, "steps", 2, "fp32", {})
    ranks = run(workers, 8, "steps", 2, "fp32", {"tensor": 4, "pipeline": 2})
    assert not any(SHARED.search(name) for name in ranks[0][1]["weights"])
    assert_one_processs(ranks, expected, theirs)
    assert_copies_are_equal([parts for _, _, parts in ranks[4:]], 2)


def assert_one_processs(ranks, expected, theirs):
    for found, ours, _ in ranks:
        for key, values in found.items():
            assert values == pytest.approx(expected[key], rel=1e-5), key
        for name, value in ours["exp_avg"].items():
            assert (value - theirs["exp_avg"][name]).norm() < 1e-4 * value.norm(), name


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_copies_stay_equal_in_bf16(stage, workers):
    ranks = run(workers, RANKS, "steps", 2, "bf16", {"tensor": 4, "sequence": True, "zero_stage": stage})
    assert_copies_are_equal([parts for _, _, parts in ranks], 2)


def test_a_run_goes_on_with_other_numbers_of_ranks(workers, text, prepared, tmp_path):
    recipe, found = tmp_path / "recipe.yaml", {}
    content = RECIPE.replace("GLSFL", "GSS").replace("num_heads: 4, head_dim: 8, w", "num_heads: 8, num_kv_heads: 2, w")
    for name, sizes in (("alone", [1]), ("moving", [4, 1, 4, 2])):
        recipe.write_text(content.format(run=tmp_path / name, data=prepared, text=text))
        for number, size in enumerate(sizes, start=1):
            keys = [f"parallel.tensor={size}", f"train.steps={8 * number // len(sizes)}", "optimizer.schedule=constant"]
            run(workers, size, "train", str(recipe), *keys)
        found[name] = metrics(tmp_path / name)
    for ours, theirs in zip(found["moving"], found["alone"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def assert_copies_are_equal(ranks, kv_heads):
    """To the last bit, and only they."""
    copies, shared = max(1, len(ranks) // kv_heads), [key for key in ranks[0] if SHARED.search(str(key))]
    assert shared
    for key in shared:
        for one, parts in enumerate(ranks):
            for other, others in enumerate(ranks):
                assert torch.equal(parts[key], others[key]) == (one // copies == other // copies), key
