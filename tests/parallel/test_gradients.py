"""Every parameter's gradient, in float64 and without DeepSpeed, in every layout of up to four processes."""

import contextlib
import functools
import itertools
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megahybrid.config.schema import ParallelConfig
from megahybrid.config.validate import validate

PATTERN, HEADS, TOKENS = "GLSNFGL", 4, 112
# Of the first samples. With two or four context parallel ranks, whose tokens begin at 28, 56 and 84, documents begin
# one token before, at and after these, and two span three ranks; the longest have more blocks than N selects.
LENGTHS = [27, 1, 84], [29, 26, 2, 55]
ROOM = 16


class Layout(NamedTuple):
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    sequence: bool = False
    context: int = 1
    data: int = 1
    tied: bool = True
    few: bool = False  # heads: fewer than context parallel ranks, as mixers allow whose tokens stay

    @property
    def world(self):
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def micro_batches(self):
        """Of all replicas together: twice as many as stages for each."""
        return 2 * self.pipeline * self.data

    def __str__(self):
        parts = [f"tp{self.tensor}", f"cp{self.context}", f"pp{self.pipeline}", f"vp{self.virtual}", f"dp{self.data}"]
        return "-".join(parts + ["sp"] * self.sequence + ["tied"] * self.tied + ["few"] * self.few)


LAYOUTS = [
    Layout(tensor, pipeline, virtual, sequence, 1, data, tied)
    for tensor, pipeline, virtual in [
        *itertools.product((1, 2, 4), (1, 2, 4), (1,)),
        *((1, 2, 2), (1, 2, 3), (2, 2, 2), (2, 2, 3)),
    ]
    for sequence in (False, True)
    for tied in (True, False)
    for data in (1, 2, 4)
    if tensor * pipeline * data <= 4 and (tensor > 1 or not sequence)
]
CONTEXT = [
    Layout(context=4),
    Layout(context=2, tensor=2, sequence=True, tied=False),
    Layout(context=2),
    Layout(context=2, pipeline=2),
    Layout(context=2, data=2),
    Layout(context=2, tensor=2),
    Layout(context=2, pipeline=2, virtual=2, tied=False),
    Layout(context=4, few=True),
]


def config_of(layout, count, train_cap):
    from tests.model import tiny

    tensor, pipeline, virtual, sequence, context, _, tied, few = layout
    config = tiny.config("GSGS" if few else PATTERN, dropout=0.3, tie_embeddings=tied, train_cap=train_cap)
    config.model.gdn.num_heads = config.model.attention.num_kv_heads = 2 if few else HEADS
    config.model.attention.num_heads = 2 * config.model.attention.num_kv_heads
    config.model.attention.window_size = 36 if few else 7  # more than a context parallel rank's tokens
    config.model.nsa.num_heads, config.model.nsa.num_kv_heads = HEADS, 2  # which four ranks share
    config.model.attention.qk_norm = config.model.nsa.qk_norm = tied
    config.train.seq_length = TOKENS
    config.train.global_batch_size = count
    config.parallel = ParallelConfig(tensor, pipeline, virtual, sequence, context)
    config.data.path = "unused"
    config.train.z_loss = 0.1
    validate(config)
    return config


def micro_batch(number):
    """The packed documents of a sample, with everything that a layout must not change."""
    from megahybrid.model.context import Context
    from megahybrid_kernels import Sequences, dropout_keys
    from tests.model import tiny

    tokens = torch.randint(0, tiny.VOCAB, (TOKENS + 1,), generator=torch.Generator().manual_seed(number))
    lengths = LENGTHS[number] if number < len(LENGTHS) else [23 + number, 1, 88 - number]
    keys = dropout_keys(torch.full((TOKENS,), number), torch.arange(TOKENS), 11, 3, 16)
    labels = tokens[1:].masked_fill(torch.arange(TOKENS) % 11 == 5, -100)  # which no rank's part of a vocabulary has
    return tokens[:-1], labels, Sequences.of(lengths), keys, Context


def gradients(layout, count, train_cap=False, exchanging=False, uncapped=None):
    """With mixers that choose themselves what context parallel ranks do, or all exchanging tokens for heads; or with
    LTE's tokens staying, and what is retained passed on `uncapped` in one of the ways that there are: ROOM has room
    for it, or ranks pass on everything, or exchange tokens for heads in this step."""
    from megahybrid.mixers.kind import Kind
    from megahybrid.mixers.lte import LTEKind

    with contextlib.ExitStack() as patches:
        if exchanging:
            patches.enter_context(mock.patch.object(Kind, "keeps_tokens", lambda *_: False))
        if uncapped:
            patches.enter_context(mock.patch.object(LTEKind, "keeps_tokens", lambda *_: layout.context > 1))
            patches.enter_context(mock.patch.object(LTEKind, "exchanges_at_times", lambda *_: uncapped != "everything"))
        return found_gradients(layout, count, train_cap, ROOM if uncapped == "room" else 0)


def found_gradients(layout, count, train_cap, room):
    """After `count` micro-batches, on this rank's stages: {name: gradient at full shape}, {LTE layer: kept}, losses,
    and all ranks' squares."""
    from megahybrid.model.stack import build_stages
    from megahybrid.parallel import groups
    from megahybrid.parallel.parameters import initialize_parameters
    from megahybrid.scaling.stages import stage_layers
    from megahybrid.training import schedule
    from tests.parallel.tokens import own_tokens

    config = config_of(layout, count, train_cap)
    groups.initialize(config.parallel)
    rank, size = groups.pipeline_parallel()
    stages = build_stages(config, stage_layers(config)[rank::size], "cpu", torch.float64)
    for stage in stages:
        initialize_parameters(stage, config.train.seed)
        stage.config.pipeline_dtype = torch.float64
        steer(stage, room)
    replica, replicas = groups.data_parallel()
    kept, losses = {}, torch.zeros((), dtype=torch.float64)

    def forward(stage, batch):
        tokens, labels, sequences, keys, context = batch
        tokens, labels = own_tokens(tokens), own_tokens(labels)
        out = stage(tokens, context(sequences, keys, layout.context * replicas / count), labels=labels)
        for layer, aux in out.aux.items():
            kept[layer] = kept.get(layer, 0) + aux.counts["kept"]
            assert "missing" not in aux.counts or not aux.counts["missing"].any()
        if out.losses is None:
            return out.hidden
        losses.add_(out.losses.detach().sum() / TOKENS)
        return out.loss / TOKENS

    batches = [micro_batch(number) for number in range(count)][replica::replicas]
    # As ZeRO-2 does, a micro-batch at a time, or as ZeRO-1.
    reduction = reduction_of(stages, by_micro_batch=layout.pipeline == 1 and not layout.tied)
    reduction.begin(len(batches))
    schedule.run(stages, batches, TOKENS, forward)
    squares = reduction.finish()
    found = gradients_of(reduction, {p: name for stage in stages for name, p in stage.named_parameters()})
    dist.all_reduce(losses)
    dist.all_reduce(squares)
    kept = {layer: whole_count(count) for layer, count in kept.items()}
    return found, kept, float(losses), float(squares) / groups.weight_holders()[1] ** 2


def reduction_of(stages, by_micro_batch):
    from megahybrid.parallel import groups
    from megahybrid.training.reduction import Bucket, Reduction, in_buckets

    holder, holders = groups.weight_holders()
    buckets = []
    for parameters in in_buckets([p for stage in stages for p in stage.parameters()], 3000):
        sums = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        sums = torch.nn.functional.pad(sums, (0, -len(sums) % holders))
        shard = sums.chunk(holders)[holder]
        sharded = by_micro_batch and not parameters[0].partial
        buckets.append(Bucket(parameters, shard.clone(), None) if sharded else Bucket(parameters, shard, sums))
    assert len(buckets) > 2
    return Reduction(buckets, torch.float64)


def gradients_of(reduction, names):
    """{name: gradient at full shape} from the shards of all that hold a weight."""
    from megahybrid.parallel import groups

    holder, holders = groups.weight_holders()
    pieces = {}
    for bucket in reduction.buckets:
        flat = torch.zeros(holders, len(bucket.shard), dtype=torch.float64)
        flat[holder] = bucket.shard
        sizes = [p.numel() for p in bucket.parameters]
        *parts, rest = flat.view(-1).split([*sizes, flat.numel() - sum(sizes)])
        assert not rest.any() and all(p.grad is None for p in bucket.parameters)
        pieces |= zip(bucket.parameters, parts, strict=True)
    return {name: whole_gradient(p, pieces[p].view_as(p)) for p, name in names.items()}


def steer(stage, room):
    """As the controller does, once routers keep some of the tokens; those of the last LTE layer pass no gradient on."""
    from megahybrid.parallel import groups

    for name, block in stage.layers.items():
        if hasattr(block.mixer, "l1_lambda"):
            rank, size = groups.tensor_parallel() if block.mixer.keeps_tokens else groups.head_parallel()
            lambdas = torch.linspace(0.3, 2.0, HEADS) * (1 + int(name))
            block.mixer.router.projection_bias.data -= 0.9
            block.mixer.router.routing_grad = int(name) < len(PATTERN) - 1
            block.mixer.l1_lambda, block.mixer.room = lambdas.chunk(size)[rank], torch.tensor(room)


def whole_gradient(parameter, gradient):
    """Over all ranks: the mean of those that hold a weight, tensor parallel parts joined, replicated ones the same on
    their ranks."""
    from megahybrid.parallel import groups

    copies = parameter.spec.copies(groups.tensor_parallel()[1])
    gradient = whole(gradient, parameter.spec.axis, copies) / groups.weight_holders()[1]
    assert gradient.shape == parameter.spec.shape
    return gradient


def whole(value, axis, copies=1):
    from megatron.core import parallel_state

    value = value.detach().clone()
    dist.all_reduce(value, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value, group=group)
    for number, part in enumerate(parts):
        assert torch.allclose(part, parts[number - number % copies], rtol=1e-13, atol=1e-15)
    return parts[0] if axis is None else torch.cat(parts[::copies], axis)


def whole_count(count):
    """Of heads that tensor and context parallel ranks split, over all replicas."""
    from megatron.core import parallel_state

    from megahybrid.parallel import groups

    rank, size = groups.head_parallel()
    parts = HEADS // len(count)
    whole = torch.zeros(HEADS, dtype=count.dtype)
    whole.chunk(parts)[rank * parts // size].copy_(count)
    dist.all_reduce(whole, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    return whole


@pytest.fixture(scope="module")
def expected(workers):
    """One process's, with embeddings tied and not, of so many micro-batches, with or without a cap in training."""

    @functools.cache
    def of(tied, few, count, train_cap=False):
        layout = Layout(tied=tied, few=few)
        return workers.run(1, "tests.parallel.test_gradients:gradients", layout, count, train_cap)[0]

    return of


# Tied embeddings take turns with others over the layouts; --slow runs both for each.
IN_TURN = {each for number, each in enumerate(LAYOUTS) if each.tied == (number // 2 % 2 == 0)}
IN_TURN |= {*CONTEXT[:2], CONTEXT[-1]}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=[] if each in IN_TURN else [pytest.mark.slow]) for each in LAYOUTS + CONTEXT],
    ids=str,
)
def test_every_gradient_is_one_processs(layout, workers, expected):
    assert_same_gradients(layout, workers, expected)


@pytest.mark.parametrize(
    "layout", [Layout(context=4), pytest.param(Layout(context=2, tensor=2), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("exchanging", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_capped_gradients_are_one_processs(layout, exchanging, workers, expected):
    """With the eviction buffer's capacity enforced in training."""
    assert_same_gradients(layout, workers, expected, train_cap=True, exchanging=exchanging)


UNCAPPED = [
    ("room", Layout(context=4)),
    ("room", Layout(context=2, tensor=2, sequence=True)),
    ("room", Layout(context=2, pipeline=2)),
    ("everything", Layout(context=4)),
    ("everything", Layout(context=2, tensor=2)),
    ("heads", Layout(context=2, tensor=2)),
    ("heads", Layout(context=2, pipeline=2)),
]


@pytest.mark.parametrize(
    ("uncapped", "layout"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (n in (2, 4, 6))) for n, each in enumerate(UNCAPPED)],
    ids=str,
)
def test_uncapped_gradients_are_one_processs(uncapped, layout, workers, expected):
    """With tokens that stay, in all ways to pass on what is retained."""
    assert_same_gradients(layout, workers, expected, uncapped=uncapped)


@pytest.mark.parametrize(
    "layout", [Layout(context=2, tensor=2), pytest.param(Layout(context=4), marks=pytest.mark.slow)], ids=str
)
def test_gradients_of_tokens_exchanged_for_heads_are_one_processs(layout, workers, expected):
    """As mixers would choose of few tokens a rank, of which here there are too many."""
    assert_same_gradients(layout, workers, expected, exchanging=True)


def assert_same_gradients(layout, workers, expected, train_cap=False, exchanging=False, uncapped=None):
    count = layout.micro_batches
    gradient, kept, losses, squares = expected(layout.tied, layout.few, count, train_cap)
    assert squares == pytest.approx(sum(float(value.square().sum()) for value in gradient.values()), rel=1e-12)
    names, layers = set(), set()
    run = "tests.parallel.test_gradients:gradients", layout, count, train_cap, exchanging, uncapped
    for found, found_kept, found_losses, found_squares in workers.run(layout.world, *run):
        assert found_losses / layout.tensor == pytest.approx(losses, rel=1e-12)
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
