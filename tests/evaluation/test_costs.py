"""What a sequence costs: the state by counting its parts, the time by a clock of our own."""

import pytest

from megahybrid.config.schema import ParallelConfig
from megahybrid.evaluation import costs
from megahybrid.inference import states
from megahybrid.parallel import groups
from tests.inference.oracle import tokens
from tests.model import tiny


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


def test_a_state_is_as_large_as_its_parts_and_only_full_attention_grows():
    keys = {length: costs.measure(tiny.model("F"), tokens(length), 32)["state_mib"] for length in (40, 300)}
    # Two KV heads of 8 channels, keys and values, in float64: 64 slots at first, doubled until all have room.
    assert keys == {40: round(64 * 2 * 8 * 2 * 8 / 2**20, 4), 300: round(512 * 2 * 8 * 2 * 8 / 2**20, 4)}
    sizes = {costs.measure(tiny.model("GLS"), tokens(length), 32)["state_mib"] for length in (40, 300)}
    assert len(sizes) == 1


def test_times_are_those_of_prefill_and_of_a_step(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(costs, "_now", lambda model: float(next(clock)))
    found = costs.measure(tiny.model("G"), tokens(100), 30)
    assert found["length"] == 100 and found["prefill_tokens_per_second"] == 100 and found["decode_ms"] == 1000


def test_memory_is_asked_for_the_keys_of_all_tokens_and_for_constant_states(monkeypatch):
    model, free = tiny.model("GF"), [0]
    monkeypatch.setattr(costs, "free_memory", lambda device: free[0])
    # Two KV heads of 8 channels, keys and values, in float64.
    constant = states.size_in_bytes({0: model.initial_states(3)[0]})
    free[0] = 3 * 1000 * 2 * 8 * 2 * 8 + constant
    costs.require_memory(model, 3, 1000)
    for sequences, length in ((3, 1001), (4, 1000)):
        with pytest.raises(MemoryError):
            costs.require_memory(model, sequences, length)
