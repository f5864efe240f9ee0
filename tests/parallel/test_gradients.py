"""Every parameter's gradient, in float64 and without DeepSpeed, in every layout of up to four processes."""

import itertools

import pytest
import torch
import torch.distributed as dist

from megahybrid.config.schema import ParallelConfig
from megahybrid.config.validate import validate

PATTERN, HEADS, TOKENS = "GLSNFGL", 4, 112
# tensor, pipeline, virtual pipeline, sequence, tied embeddings; and the data parallel size.
LAYOUTS = [
    ((tensor, pipeline, virtual, sequence, tied), data)
    for tensor, pipeline, virtual in [
        *itertools.product((1, 2, 4), (1, 2, 4), (1,)),
        *((1, 2, 2), (1, 2, 3), (2, 2, 2), (2, 2, 3)),
    ]
    for sequence in (False, True)
    for tied in (True, False)
    for data in (1, 2, 4)
    if tensor * pipeline * data <= 4 and (tensor > 1 or not sequence)
]


def micro_batches(layout, data):
    """How many of all replicas together: twice as many as stages for each."""
    return 2 * layout[1] * data


def config_of(layout, count):
    from tests.model import tiny

    tensor, pipeline, virtual, sequence, tied = layout
    config = tiny.config(PATTERN, dropout=0.3, tie_embeddings=tied)
    config.model.gdn.num_heads = config.model.attention.num_kv_heads = HEADS
    config.model.attention.num_heads = 2 * HEADS
    config.model.nsa.num_heads, config.model.nsa.num_kv_heads = HEADS, 2  # which four ranks share
    config.train.seq_length = TOKENS
    config.train.global_batch_size = count
    config.parallel = ParallelConfig(tensor, pipeline, virtual, sequence)
    config.data.path = "unused"
    config.train.z_loss = 0.1
    validate(config)
    return config


def micro_batch(number):
    """The packed documents of a sample, with everything that a layout must not change."""
    from megahybrid.model.context import Context, dropout_keys
    from megahybrid_kernels import Sequences
    from tests.model import tiny

    tokens = torch.randint(0, tiny.VOCAB, (TOKENS + 1,), generator=torch.Generator().manual_seed(number))
    lengths = [23 + number, 1, 88 - number]  # the last has more blocks than N selects
    keys = dropout_keys(11, 3, torch.full((TOKENS,), number), torch.arange(TOKENS), 16)
    labels = tokens[1:].masked_fill(torch.arange(TOKENS) % 11 == 5, -100)  # which no rank's part of a vocabulary has
    return tokens[:-1], labels, Sequences.of(lengths), keys, Context


def gradients(layout, count):
    """After `count` micro-batches, on this rank's stages: {name: gradient at full shape}, {LTE layer: kept}, losses,
    and all ranks' squares."""
    from megahybrid.model.stack import build_stages
    from megahybrid.parallel import groups
    from megahybrid.parallel.parameters import initialize_parameters
    from megahybrid.scaling.stages import stage_layers
    from megahybrid.training import schedule

    config = config_of(layout, count)
    groups.initialize(config.parallel)
    rank, size = groups.pipeline_parallel()
    stages = build_stages(config, stage_layers(config)[rank::size], "cpu", torch.float64)
    for stage in stages:
        initialize_parameters(stage, config.train.seed)
        stage.config.pipeline_dtype = torch.float64
        set_lambdas(stage)
    replica, replicas = groups.data_parallel()
    kept, losses = {}, torch.zeros((), dtype=torch.float64)

    def forward(stage, batch):
        tokens, labels, sequences, keys, context = batch
        out = stage(tokens, context(sequences, keys, replicas / count), labels=labels)
        for layer, aux in out.aux.items():
            kept[layer] = kept.get(layer, 0) + aux.counts["kept"]
        if out.losses is None:
            return out.hidden
        losses.add_(out.losses.detach().mean())
        return out.loss / TOKENS

    batches = [micro_batch(number) for number in range(count)][replica::replicas]
    # As ZeRO-2 does, a micro-batch at a time, or as ZeRO-1.
    reduction = reduction_of(stages, by_micro_batch=layout[1] == 1 and not layout[4])
    reduction.begin(len(batches))
    schedule.run(stages, batches, TOKENS, forward)
    squares = reduction.finish()
    found = gradients_of(reduction, {p: name for stage in stages for name, p in stage.named_parameters()})
    dist.all_reduce(losses)
    dist.all_reduce(squares)
    kept = {layer: whole(count, 0) for layer, count in kept.items()}
    return found, kept, float(losses), float(squares) / replicas**2


def reduction_of(stages, by_micro_batch):
    from megahybrid.parallel import groups
    from megahybrid.training.reduction import Bucket, Reduction, in_buckets

    replica, replicas = groups.data_parallel()
    buckets = []
    for parameters in in_buckets([p for stage in stages for p in stage.parameters()], 3000):
        sums = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        sums = torch.nn.functional.pad(sums, (0, -len(sums) % replicas))
        shard = sums.chunk(replicas)[replica]
        sharded = by_micro_batch and not parameters[0].partial
        buckets.append(Bucket(parameters, shard.clone(), None) if sharded else Bucket(parameters, shard, sums))
    assert len(buckets) > 2
    return Reduction(buckets, torch.float64)


def gradients_of(reduction, names):
    """{name: gradient at full shape} from all replicas' shards."""
    from megahybrid.parallel import groups

    replica, replicas = groups.data_parallel()
    pieces = {}
    for bucket in reduction.buckets:
        flat = torch.zeros(replicas, len(bucket.shard), dtype=torch.float64)
        flat[replica] = bucket.shard
        sizes = [p.numel() for p in bucket.parameters]
        *parts, rest = flat.view(-1).split([*sizes, flat.numel() - sum(sizes)])
        assert not rest.any() and all(p.grad is None for p in bucket.parameters)
        pieces |= zip(bucket.parameters, parts, strict=True)
    return {name: whole_gradient(p, pieces[p].view_as(p)) for p, name in names.items()}


def set_lambdas(stage):
    from megahybrid.parallel import groups

    rank, size = groups.tensor_parallel()
    for name, block in stage.layers.items():
        if hasattr(block.mixer, "l1_lambda"):
            lambdas = torch.linspace(0.3, 2.0, HEADS) * (1 + int(name))
            block.mixer.l1_lambda = lambdas.chunk(size)[rank]


def whole_gradient(parameter, gradient):
    """Over all ranks: replicas' mean, tensor parallel parts joined, replicated ones the same on their ranks."""
    from megahybrid.parallel import groups

    copies = parameter.spec.copies(groups.tensor_parallel()[1])
    gradient = whole(gradient, parameter.spec.axis, copies) / groups.data_parallel()[1]
    assert gradient.shape == parameter.spec.shape
    return gradient


def whole(value, axis, copies=1):
    from megatron.core import parallel_state

    value = value.detach().clone()
    dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value, group=group)
    for number, part in enumerate(parts):
        assert torch.allclose(part, parts[number - number % copies], rtol=1e-13, atol=1e-15)
    return parts[0] if axis is None else torch.cat(parts[::copies], axis)


@pytest.fixture(scope="module")
def expected(workers):
    """One process's, with embeddings tied and not, of every number of micro-batches."""
    run = "tests.parallel.test_gradients:gradients"
    kinds = itertools.product((True, False), {micro_batches(*each) for each in LAYOUTS})
    return {(tied, count): workers.run(1, run, (1, 1, 1, False, tied), count)[0] for tied, count in kinds}


# Tied embeddings take turns with others over the layouts; --slow runs both for each.
IN_TURN = {each for number, each in enumerate(LAYOUTS) if each[0][4] == (number // 2 % 2 == 0)}


@pytest.mark.parametrize(
    ("layout", "data"),
    [pytest.param(*each, marks=[] if each in IN_TURN else [pytest.mark.slow]) for each in LAYOUTS],
    ids=str,
)
def test_every_gradient_is_one_processs(layout, data, workers, expected):
    world, count = layout[0] * layout[1] * data, micro_batches(layout, data)
    gradient, kept, losses, squares = expected[layout[-1], count]
    assert squares == pytest.approx(sum(float(value.square().sum()) for value in gradient.values()), rel=1e-12)
    names, layers = set(), set()
    for found, found_kept, found_losses, found_squares in workers.run(
        world, "tests.parallel.test_gradients:gradients", layout, count
    ):
        assert found_losses / layout[0] == pytest.approx(losses, rel=1e-12)
        assert found_squares == pytest.approx(squares, rel=1e-10)
        for name, value in found.items():
            scale = gradient[name].abs().max()
            assert scale > 1e-9, f"{name} has no gradient to compare"
            assert (value - gradient[name]).abs().max() < 1e-10 * scale, name
        for layer, count in found_kept.items():
            assert torch.equal(count, kept[layer]), layer
        names |= found.keys()
        layers |= found_kept.keys()
    assert names == gradient.keys() and layers == kept.keys()


def shared_gradient(dtype, projected):
    """Of four tensor parallel ranks, where rank i gives 1 to the i-th entry and 2⁻⁹ to the others, all to the same
    weight: by its use as it is, or by a projection to rows of which each rank has a copy."""
    from megahybrid.parallel import groups
    from megahybrid.parallel.layers import ColumnLinear, project, shared
    from megahybrid.parallel.parameters import constant

    groups.initialize(ParallelConfig(tensor=4))
    given = torch.full((1, 1, 4), 2**-9, dtype=getattr(torch, dtype))
    given[..., groups.tensor_parallel()[0]] = 1
    layer = ColumnLinear(4, 1, constant(0), parts=1).to(given.dtype)
    layer.weight.partial = True
    if projected:
        (y,) = project(given, [layer], sequence_parallel=False)
        y.backward(torch.ones_like(y))
    else:
        shared(layer.weight).backward(given[0])
    return layer.weight.grad[0]


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("dtype", "expected"), [("float64", 1 + 3 * 2**-9), ("bfloat16", 1 + 2**-7)])
def test_a_shared_weights_gradient_is_summed_in_fp32_at_least(dtype, expected, projected, workers):
    """In bf16, 1 + 2⁻⁹ is 1: whatever the order, some entry would stay there."""
    for gradient in workers.run(4, "tests.parallel.test_gradients:shared_gradient", dtype, projected):
        assert gradient.dtype == getattr(torch, dtype) and gradient.tolist() == [expected] * 4
