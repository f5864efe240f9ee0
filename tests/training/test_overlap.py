"""Gradients are reduced beside the backward pass, and the host seldom waits for the device."""

import pytest

EVENTS, WAITS = "tests.training.overlap:events", "tests.training.overlap:host_waits"
LAYOUTS = [
    ({"zero_stage": 1}, 4),
    ({"zero_stage": 2}, 2),
    ({"zero_stage": 3}, 2),
    ({"tensor": 2, "sequence": True}, 2),
    ({"pipeline": 2}, 2),
    ({"pipeline": 2, "virtual_pipeline": 2}, 1),
]


@pytest.mark.parametrize(("stage", "micro_batches"), [(1, 1), (1, 2), (2, 2), (3, 2)])
def test_reductions_begin_before_the_first_layers_backward_pass_has_ended(stage, micro_batches, workers):
    for found in workers.run(4 // micro_batches, EVENTS, "bf16", {"zero_stage": stage}):
        first_layer = [number for number, name in enumerate(found) if name.startswith("layers.0.")]
        assert len(first_layer) % micro_batches == 0 and first_layer
        reductions = [number for number, name in enumerate(found) if name == "reduced"]
        passes = [name for name in found if name == "final_norm.weight"]
        assert len(passes) == micro_batches
        # ZeRO-1 waits for the last micro-batch.
        begun = [number for number in reductions if number < first_layer[0]]
        last = max(number for number, name in enumerate(found) if name == "final_norm.weight")
        if stage == 1:
            begun = [number for number in reductions if number < first_layer[-len(first_layer) // micro_batches]]
            assert min(reductions) > last
        assert len(begun) >= 3
        assert len(reductions) > len(begun)


@pytest.mark.parametrize(("parallel", "data"), LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", ["bf16"])
def test_the_host_waits_at_most_twice_a_step(dtype, parallel, data, workers):
    world = data * parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    for found in workers.run(world, WAITS, dtype, parallel):
        assert 1 <= len(found) <= 2, found
