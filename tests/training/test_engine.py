"""Two optimizer steps of the engine beside plain autograd, torch's clipping and torch's AdamW on one process."""

import functools

import pytest
import torch

ENGINE, TORCH = "tests.training.steps:by_engine", "tests.training.steps:by_torch"
# Layouts of two and four processes with a tied embedding whose two gradients come together in different ways.
LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"tensor": 2, "zero_stage": 2},
    {"tensor": 2, "sequence": True, "zero_stage": 3},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"tensor": 2, "pipeline": 2, "sequence": True},
    {"pipeline": 2, "data": 2},
    {"tensor": 2, "data": 2, "zero_stage": 2},
]
REPRESENTATIVE = [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}]
TIED = "embedding.weight"
# Bounds of `assert_same_steps`.
EXACT = 1e-6, 1e-6, 1e-5, 1e-4
SUMMED_OTHERWISE = 1e-6, 1e-5, 1e-4, 1e-3
# A tensor parallel layout rounds other partial sums of activations, and in this small model some keep decisions then
# fall differently: after an update the gradients have no more to do with each other.
ROUNDED = 5e-3, 1e-2, 0.2


@pytest.fixture(scope="module")
def expected(workers):
    """By type, whether embeddings are tied, and whether products are added to sums without being rounded."""

    @functools.cache
    def of(dtype, tied=True, products=False):
        return workers.run(1, TORCH, dtype, tied, None, products)[0]

    return of


def run(workers, dtype, data=1, tied=True, **parallel):
    world = data * parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    return workers.run(world, ENGINE, dtype, parallel, tied)


def distance(found, theirs, start=None):
    """The largest of all parameters' relative distances, by norms; of what has changed since `start`, if given."""
    largest = 0.0
    for name, value in found.items():
        other = theirs[name]
        scale = (other - start[name] if start else other).norm()
        if float(scale) > 1e-12:
            largest = max(largest, float((value.double() - other).norm() / scale))
        else:
            assert float(value.double().norm()) <= 1e-9, name
    return largest


def assert_same_steps(ranks, theirs, losses, norms, *bounds):
    """Losses and the gradient's norms within these; weights' changes and moments within a bound for each step."""
    names = set()
    for rank in ranks:
        assert rank["losses"] == pytest.approx(theirs["losses"], rel=losses)
        steps = len(bounds)
        assert rank["norms"][:steps] == pytest.approx(theirs["norms"][:steps], rel=norms)
        assert min(theirs["norms"]) > 2 * 0.3  # or nothing is clipped
        start = theirs["states"][0]["weights"]
        for name, value in rank["states"][0]["weights"].items():
            assert torch.equal(value.double(), start[name]), f"{name} is rounded"
        for bound, ours, other in zip(bounds, rank["states"][1:], theirs["states"][1:], strict=False):
            assert distance(ours["exp_avg"], other["exp_avg"]) < bound
            assert distance(ours["exp_avg_sq"], other["exp_avg_sq"]) < 2 * bound
            assert distance(ours["weights"], other["weights"], start) < bound + 1e-4  # an fp32 weight's last bit
        names |= rank["states"][0]["weights"].keys()
    assert names == start.keys()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp32_steps_are_those_of_torch(stage, workers, expected):
    assert_same_steps(run(workers, "fp32", data=2, zero_stage=stage), expected("fp32"), *EXACT)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_steps_are_those_of_torch_on_exact_sums_of_bf16_gradients(stage, workers, expected):
    """Not so if the sums over micro-batches and replicas were rounded, or the products that are added to them: that is
    1e-3 and more."""
    ranks = run(workers, "bf16", data=2, zero_stage=stage)
    assert_same_steps(ranks, expected("bf16", products=True), *EXACT)
    for rank in ranks:
        assert all(sums.keys() == {"torch.float32"} for sums in rank["sums"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_reduction_sends_bf16(stage, workers, expected):
    theirs = expected("bf16", products=True)["states"][1]["exp_avg"]
    for rank in run(workers, "bf16", data=2, zero_stage=stage, gradient_reduction="bf16"):
        found = rank["states"][1]["exp_avg"]
        # Of all parameters together: one of two numbers has whatever its ranks' parts lose when they cancel.
        off, norm = (
            sum(float(x.norm()) ** 2 for x in xs) ** 0.5
            for xs in ([found[n] - theirs[n] for n in theirs], theirs.values())
        )
        assert 5e-4 < off / norm < 2**-8
        parameters = sum(value.numel() for value in theirs.values())
        assert all(sums["torch.bfloat16"] >= parameters for sums in rank["sums"])


def possibly_slow(layout):
    name = "-".join(f"{key}={value}" for key, value in layout.items())
    return pytest.param(layout, id=name, marks=[] if layout in REPRESENTATIVE else [pytest.mark.slow])


@pytest.mark.parametrize("layout", map(possibly_slow, LAYOUTS))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_do_not_depend_on_the_layout(dtype, layout, workers, expected):
    ranks = run(workers, dtype, **layout)
    assert_same_steps(ranks, expected(dtype), *(ROUNDED if dtype == "bf16" else SUMMED_OTHERWISE))
    holders = [rank["states"] for rank in ranks if TIED in rank["states"][0]["weights"]]
    assert all(torch.equal(*(each[-1]["weights"][TIED] for each in (states, holders[0]))) for states in holders)
    of_one = expected(dtype)["states"][1]["exp_avg"][TIED]
    # Without the output layer's part it is 0.14.
    assert distance({TIED: holders[0][1]["exp_avg"][TIED]}, {TIED: of_one}) < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_copies_of_a_tied_embedding_stay_equal_to_the_last_bit(dtype, workers):
    """With more than two replicas, whose sums have an order, and in a large embedding."""
    ranks = workers.run(8, ENGINE, dtype, {"pipeline": 2}, True, 1003)
    theirs = workers.run(1, TORCH, dtype, True, 1003)[0]
    for states in zip(*(rank["states"] for rank in ranks if TIED in rank["states"][0]["weights"]), strict=True):
        for kind in states[0]:
            assert all(torch.equal(each[kind][TIED], states[0][kind][TIED]) for each in states), kind
    # After the first update a keep decision falls otherwise, as it does without a pipeline.
    assert_same_steps(ranks, theirs, *(ROUNDED if dtype == "bf16" else SUMMED_OTHERWISE[:3]))
