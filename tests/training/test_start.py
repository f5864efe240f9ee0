"""What a rank makes, draws and reads at the start: its own shard, whatever the layout."""

import pytest
import torch
from safetensors.torch import save_file

from megahybrid.errors import UserError
from megahybrid.parallel.parameters import ParameterSpec, constant
from megahybrid.scaling.memory import check_room, start_up
from megahybrid.training.tensor_files import read_part

LAYOUTS = [
    {"data": 2},
    {"data": 2, "zero_stage": 2},
    {"data": 2, "zero_stage": 3},
    {"tensor": 2, "data": 2, "zero_stage": 3},
]


def config_of(**parallel):
    from megahybrid.config.schema import Config, ModelConfig, ParallelConfig, RunConfig, TrainConfig
    from megahybrid.mixers.attention import AttentionConfig
    from megahybrid.mixers.gdn import GDNConfig

    return Config(
        run=RunConfig(dir="unused"),
        model=ModelConfig(
            pattern="GLG",
            hidden_size=64,
            vocab_size=250,
            gdn=GDNConfig(num_heads=2, head_dim=16),
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
        ),
        train=TrainConfig(seq_length=64, micro_batch_size=1, global_batch_size=4, steps=1),
        parallel=ParallelConfig(**parallel),
    )


def started(parallel):
    """In a worker: elements that stood whole on this rank at a time while the model was made, and by name and kind
    where its shards begin, how long they are, and how many this tensor parallel rank has in all."""
    import math
    from unittest import mock

    from megahybrid.parallel import groups
    from megahybrid.training import gathering, zero
    from megahybrid.training.engine import Engine

    config, whole, models = config_of(**parallel), [], []
    groups.initialize(config.parallel)
    make, own, weights = zero.materialize, zero.own, gathering.Weights.__init__

    def note():
        stand = [each for model in models for each in model.parameters() if not each.is_meta]
        memory = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in stand}
        assert all(each.dtype == torch.bfloat16 for each in stand)
        whole.append(sum(memory.values()) // 2)

    def owning(config, model):
        models.append(model)
        return own(config, model)

    def making(*arguments):
        make(*arguments)
        note()

    def laying(self, *arguments, **options):
        weights(self, *arguments, **options)
        note()

    with (
        mock.patch.object(zero, "own", owning),
        mock.patch.object(zero, "materialize", making),
        mock.patch.object(gathering.Weights, "__init__", laying),
    ):
        engine = Engine(config)
    _, size = groups.tensor_parallel()
    places = {}
    for name, parameter in engine.model.named_parameters():
        for kind in zero.KINDS:
            begin, held = engine.zero.place(parameter, kind)
            places[name, kind] = begin, len(held), math.prod(parameter.spec.local_shape(size))
    return groups.tensor_parallel()[0], whole, places


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_replicas_hold_every_element_once(layout, workers):
    parallel = {key: value for key, value in layout.items() if key != "data"}
    tensor = parallel.get("tensor", 1)
    ranks = workers.run(tensor * layout["data"], "tests.training.test_start:started", parallel)
    for member in range(tensor):
        replicas = [places for number, _, places in ranks if number == member]
        for key, (*_, count) in replicas[0].items():
            reached = 0
            for begin, length, _ in sorted(places[key] for places in replicas if places[key][1]):
                assert begin == reached, key
                reached += length
            assert reached == count, key


def test_zero_3_makes_a_layer_at_a_time(workers):
    """The largest piece is the embedding or the output layer, or one of three layers; at most half stays whole."""
    for _, whole, places in workers.run(2, "tests.training.test_start:started", {"zero_stage": 3}):
        every = {name: count for (name, _), (*_, count) in places.items()}
        layers = [sum(n for name, n in every.items() if name.startswith(f"layers.{i}.")) for i in range(3)]
        made, laid = whole[:6], whole[6:]
        assert max(made) == max(250 * 64, *layers) < sum(every.values()) / 2
        assert 2 * 250 * 64 <= laid[-1] <= max(laid) < sum(every.values()) * 0.6


@pytest.mark.parametrize(
    ("shape", "axis", "parts"),
    [((12,), 0, None), ((12,), None, None), ((8, 6, 2), 0, 2), ((3, 8), 1, None), ((5, 7), None, None)],
)
def test_any_elements_of_any_part_are_read(shape, axis, parts, tmp_path):
    value = torch.randn(shape)
    save_file({"x": value}, tmp_path / "file")
    spec = ParameterSpec(shape, axis, constant(0), True, parts)
    for rank, size in ((0, 1), (0, 2), (1, 2), (2, 4), (3, 4)):
        flat = spec.shard(value, rank, size).reshape(-1)
        for begin, end in ((0, len(flat)), (0, 1), (1, 3), (2, len(flat)), (len(flat) - 1, len(flat))):
            found = read_part(tmp_path / "file", "x", spec, rank, size, range(begin, end))
            assert torch.equal(found, flat[begin:end])


def test_a_model_that_cannot_start_is_refused():
    """18 bytes a parameter on one replica; on four, ZeRO-2 begins with sums of all gradients."""
    config = config_of(zero_stage=2)
    assert start_up(config, 1000, 1) == 18_000 and start_up(config, 1000, 4) == 8_000
    check_room(config, 4, 2**30)
    with pytest.raises(
        UserError, match=r"a GPU holds 0\.0 GiB before the first step, and this one has 0\.0; use paral"
    ):
        check_room(config, 4, 2**10)
