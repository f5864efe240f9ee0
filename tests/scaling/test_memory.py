"""Memory estimates against what a pass with the Triton kernels really leaves allocated."""

import importlib
import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import KernelInterface

from megahybrid.config.schema import Config, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megahybrid.mixers.attention import AttentionConfig
from megahybrid.mixers.gdn import GDNConfig
from megahybrid.mixers.lte import LTEConfig
from megahybrid.mixers.lte.module import LTEAttention
from megahybrid.mixers.nsa import NSAConfig
from megahybrid.model.context import Context
from megahybrid.model.settings import Settings
from megahybrid.model.stack import build
from megahybrid.parallel import groups
from megahybrid.scaling import memory, splitting
from megahybrid.scaling.parameters import parameters_by_rank
from megahybrid_kernels import Sequences, dropout_keys
from megahybrid_kernels.linear_cross_entropy import chunks
from tests.parallel.tokens import own_tokens

LENGTH = 1024
OPS = """causal_conv1d gated_delta_rule lte_attention native_sparse_attention norm retention_router rotary swiglu
linear_cross_entropy.chunks"""


class Flash(torch.autograd.Function):
    """Saves what torch's flash attention saves."""

    @staticmethod
    def forward(ctx, q, k, v, *_):
        o = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, o, q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32))
        return o

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        torch.zeros_like(q, dtype=torch.float32)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), *[None] * 5


def use_triton(patch):
    """All ops allocate on a CPU what they do on a GPU, and compute nothing: no launch depends on what one left."""
    for function in (KernelInterface, InterpretedFunction):
        patch.setattr(function, "__getitem__", lambda self, grid: lambda *x, **constants: None)
    for op in OPS.split():
        patch.setattr(importlib.import_module(f"megahybrid_kernels.{op}"), "takes_triton", lambda *_: True)
    patch.setattr(chunks, "add_product", lambda *_: None)
    attention = importlib.import_module("megahybrid_kernels.attention")
    patch.setattr(attention, "_takes_varlen", lambda q: q.dtype == torch.bfloat16)
    patch.setattr(attention, "varlen_attn", lambda *x, window_size: Flash.apply(*x, window_size))


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    use_triton(monkeypatch)


def config_of(
    pattern,
    dtype="bf16",
    recompute="none",
    dropout=0.1,
    heads=4,
    kv_heads=4,
    vocab=1024,
    buffer=64,
    train_cap=False,
    qk_norm=False,
    **parallel,
):
    own = {"qk_norm": qk_norm}
    return Config(
        run=RunConfig(dir="unused"),
        model=ModelConfig(
            pattern=pattern,
            hidden_size=256,
            vocab_size=vocab,
            gdn=GDNConfig(num_heads=4, head_dim=64, value_head_dim=96),
            attention=AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=64, window_size=100, **own),
            lte=LTEConfig(window_size=63, buffer_size=buffer, dropout=dropout, train_cap=train_cap),
            nsa=NSAConfig(num_heads=8, num_kv_heads=2, block_size=32, num_blocks=8, window_size=100, **own),
        ),
        train=TrainConfig(
            seq_length=LENGTH, micro_batch_size=1, global_batch_size=8, steps=1, dtype=dtype, recompute=recompute
        ),
        parallel=ParallelConfig(**parallel),
    )


def step_of(config):
    """A model and a function that runs its forward pass, warmed up: what is cached for later passes does not count."""
    model = build(config, "cpu", torch.bfloat16 if config.train.dtype == "bf16" else torch.float32)
    tokens, labels = (own_tokens(torch.arange(LENGTH + 1)[n:][:LENGTH] % config.model.vocab_size) for n in (0, 1))
    keys = dropout_keys(torch.zeros(LENGTH, dtype=torch.int64), torch.arange(LENGTH), 0, 1, 16)
    context = Context(Sequences.of((LENGTH,)), keys)

    def forward():
        return model(tokens, context, labels)

    forward().loss.backward()  # makes the gradients, which stay
    return forward


def kept_bytes(config):
    """Bytes that are allocated in a forward pass and still held after it."""
    forward = step_of(config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = forward()
    assert out.loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


def most_bytes(config):
    """Most bytes that a forward and backward pass has allocated at a time."""
    forward = step_of(config)
    mkldnn = torch.backends.mkldnn.flags(enabled=False)  # what its products take beside their result is each CPU's own
    with mkldnn, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward().loss.backward()
    return most_allocated(profiled)


def most_allocated(profiled):
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes))


def saved_bytes(config):
    """Bytes of all storage that autograd saves: beside collectives, whose threads free what the profiler misses."""
    forward, storages = step_of(config), {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    assert out.loss.requires_grad
    return sum(storages.values())


def layer_bytes(letter, counted=kept_bytes, **options):
    """What one layer more keeps."""
    return counted(config_of(letter * 3, **options)) - counted(config_of(letter * 2, **options))


def layer_bytes_of_a_rank(letter, options, room=0):
    """room: of LTE without a cap, whose tokens stay then."""
    groups.initialize(config_of(letter, **options).parallel)
    with pytest.MonkeyPatch.context() as patch:
        use_triton(patch)
        patch.setattr(LTEAttention, "room", property(lambda _: room, lambda *_: None), raising=False)
        return layer_bytes(letter, saved_bytes, **options)


def estimated(letter, **options):
    """A layer's bytes by the formulas."""
    config = config_of(letter, **options)
    return LENGTH // config.parallel.context * memory.layer(config, Settings.of(config), letter)


@pytest.mark.parametrize(
    ("letter", "options"),
    [
        ("G", {"dtype": "bf16"}),
        ("G", {"dtype": "fp32"}),
        ("L", {"dtype": "bf16"}),
        ("L", {"dtype": "fp32"}),
        ("L", {"dtype": "bf16", "dropout": 0.0}),
        ("L", {"dtype": "bf16", "kv_heads": 2}),
        ("S", {"dtype": "bf16"}),
        ("F", {"dtype": "bf16", "kv_heads": 2}),
        ("S", {"dtype": "fp32"}),
        ("F", {"dtype": "fp32"}),
        ("F", {"dtype": "fp32", "kv_heads": 2}),
        ("N", {"dtype": "bf16"}),
        ("N", {"dtype": "fp32"}),
        ("L", {"dtype": "bf16", "qk_norm": True}),
        ("F", {"dtype": "bf16", "kv_heads": 2, "qk_norm": True}),
        ("S", {"dtype": "fp32", "qk_norm": True}),
        ("N", {"dtype": "bf16", "qk_norm": True}),
    ],
)
def test_a_layers_activations_are_what_it_leaves_allocated(letter, options):
    assert layer_bytes(letter, **options) == pytest.approx(estimated(letter, **options), rel=0.05)


@pytest.mark.parametrize("sequence", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("letter", "options"),
    [
        ("G", {"dtype": "bf16"}),
        ("L", {"dtype": "bf16", "kv_heads": 2}),
        ("S", {"dtype": "fp32"}),
        ("F", {"dtype": "fp32"}),
        ("N", {"dtype": "bf16"}),
    ],
)
def test_a_tensor_parallel_rank_keeps_its_part(letter, options, sequence, workers):
    options = {**options, "tensor": 2, "sequence": sequence}
    expected = pytest.approx(estimated(letter, **options), rel=0.05)
    assert workers.run(2, "tests.scaling.test_memory:layer_bytes_of_a_rank", letter, options) == [expected] * 2


@pytest.mark.parametrize(
    ("letter", "dtype", "kv_heads", "train_cap"),
    [
        ("G", "bf16", 4, False),
        ("L", "bf16", 2, True),
        pytest.param("S", "fp32", 4, False, marks=pytest.mark.slow),
        pytest.param("S", "bf16", 4, False, marks=pytest.mark.slow),
        pytest.param("F", "bf16", 4, False, marks=pytest.mark.slow),
        ("N", "bf16", 4, False),
    ],
)
def test_a_context_parallel_rank_keeps_its_part(letter, dtype, kv_heads, train_cap, workers):
    options = {"dtype": dtype, "kv_heads": kv_heads, "train_cap": train_cap, "context": 2}
    first, last = workers.run(2, "tests.scaling.test_memory:layer_bytes_of_a_rank", letter, options)
    assert last == pytest.approx(estimated(letter, **options), rel=0.05)
    least = 0.9 if letter in "LS" else 0.999  # before the first are no rows of a window, and nothing is retained
    assert least * last <= first <= last


@pytest.mark.parametrize(
    ("options", "room", "most"),
    [
        ({"heads": 16, "kv_heads": 4}, 256, True),
        ({"heads": 16, "kv_heads": 4}, 0, False),  # with room it has more
        ({"heads": 16, "kv_heads": 2, "buffer": 8}, 0, True),
        ({"heads": 4, "kv_heads": 1}, 0, True),
    ],
)
def test_a_context_parallel_rank_keeps_what_is_retained_without_a_cap(options, room, most, workers):
    """With room for it, exchanged for heads where there is none, or where heads are too few all that is before: a plan
    has the most, which is the last rank's."""
    options = {"context": 2, **options}
    *_, last = workers.run(2, "tests.scaling.test_memory:layer_bytes_of_a_rank", "L", options, room)
    expected = estimated("L", **options)
    assert last == pytest.approx(expected, rel=0.05) if most else last < 0.95 * expected


@pytest.mark.parametrize("letter", "GLSFN")
def test_with_recompute_a_layer_keeps_its_input(letter):
    selection = 4 * 2 * 8 if letter == "N" else 0  # int32, of two KV heads and eight blocks
    assert layer_bytes(letter, recompute="all") == pytest.approx((2 * 256 + selection) * LENGTH, rel=0.1)


@pytest.mark.parametrize("sequence", [False, True])
def test_with_recompute_a_tensor_parallel_rank_keeps_its_part_of_the_stream(sequence, workers):
    options = {"recompute": "all", "tensor": 2, "sequence": sequence}
    expected = pytest.approx(2 * 256 * LENGTH / (2 if sequence else 1), rel=0.1)
    assert workers.run(2, "tests.scaling.test_memory:layer_bytes_of_a_rank", "G", options) == [expected] * 2


RECOMPUTED = [("GLGL", "none"), ("LLGG", "G"), ("GLGL", "all"), ("GLGL", "G"), ("GLGL", "L"), ("GGLL", "G")]


# The vocabulary decides whether the peak is at the loss or in a layer's backward pass.
@pytest.mark.parametrize(
    ("pattern", "recompute", "vocab"),
    [
        *[(*each, 1024) for each in RECOMPUTED],
        *[pytest.param(*each, 8192, marks=[pytest.mark.slow] * (n > 1)) for n, each in enumerate(RECOMPUTED)],
    ],
)
def test_the_peak_is_what_a_pass_has_allocated(pattern, recompute, vocab):
    config = config_of(pattern, recompute=recompute, vocab=vocab)
    assert memory.activations(config, 1, 0) == pytest.approx(most_bytes(config), rel=0.06)


@pytest.mark.parametrize(("pattern", "recompute"), [("SFSF", "none"), ("SFSF", "F"), ("SFSF", "all"), ("FFSS", "F")])
def test_the_peak_of_attention_in_fp32(pattern, recompute):
    config = config_of(pattern, dtype="fp32", recompute=recompute)
    assert memory.activations(config, 1, 0) == pytest.approx(most_bytes(config), rel=0.06)


@pytest.mark.parametrize("recompute", ["none", "N"])
def test_the_peak_of_sparse_attention(recompute):
    """With heads so many that the peak is in its backward pass."""
    config = config_of("NN", recompute=recompute)
    config.model.nsa.num_heads = 32
    assert memory.activations(config, 1, 0) == pytest.approx(most_bytes(config), rel=0.03)


def test_zero_splits_what_its_stage_says():
    bf16, fp32 = config_of("G"), config_of("G", dtype="fp32")
    assert memory.states(bf16, 1000, 1, 1) == 1000 * (2 + 4 + 12)
    assert memory.states(bf16, 1000, 1, 8) == 1000 * (2 + 4 + 1.5)
    assert memory.states(bf16, 1000, 2, 8) == 1000 * (2 + 0.5 + 1.5)
    assert memory.states(bf16, 1000, 3, 8) == 1000 * 18 / 8
    assert memory.states(fp32, 1000, 1, 8) == 1000 * (4 + 4 + 1.5)


STREAM = 2 * 256 * LENGTH
"""Bytes of the residual stream at one place."""
BACKWARD = 2 * 2 * 768 * LENGTH + STREAM
"""What the backward pass through a layer adds in its SwiGLU, with which it begins."""


@pytest.mark.parametrize(("replicas", "held"), [(1, (4, 3, 2, 1)), (4, (2, 2, 2, 1)), (8, (1, 1, 1, 1))])
def test_a_pipeline_rank_holds_the_micro_batches_in_flight(replicas, held):
    """Eight micro-batches over the replicas; every rank has two layers, and one's SwiGLU begins the backward pass."""
    config = config_of("GG|GG|GG|GG", pipeline=4)
    for rank, (count, borders) in enumerate(zip(held[:3], (1, 2, 2), strict=True)):
        expected = count * (2 * estimated("G") + borders * STREAM) + BACKWARD
        assert memory.activations(config, replicas, rank) == pytest.approx(expected)
    whole = memory.activations(config_of("GG", vocab=8192), 1, 0)
    last = memory.activations(config_of("GG|GG|GG|GG", pipeline=4, vocab=8192), replicas, 3)
    assert last == pytest.approx(whole + STREAM)


def test_uneven_stages_and_the_fullest_rank():
    config = config_of("G|GGGGG", pipeline=2, vocab=8192)
    first, last = (memory.activations(config, 1, rank) for rank in (0, 1))
    assert first == pytest.approx(2 * (estimated("G") + STREAM) + BACKWARD)
    assert last == pytest.approx(memory.activations(config_of("GGGGG", vocab=8192), 1, 0) + STREAM)
    assert max(memory.peak_bytes(config, 1)) == memory.peak_bytes(config, 1)[1]


def test_interleaved_chunks_hold_more_than_one_stage():
    """Rank 0 of 2 with 2 chunks: five passes are in flight, of the chunks 3 and 2 after the warm-up, then 4 and 1.

    With f and b for forward and backward passes of chunks 0 and 1 the schedule begins f0 f0 f1 f1 f0 b1 f0 b1.
    """
    config = config_of("GG|G|G|G", pipeline=2, virtual_pipeline=2)
    first, second = 2 * estimated("G") + STREAM, estimated("G") + 2 * STREAM
    expected = 4 * first + second + BACKWARD
    assert memory.activations(config, 1, 0) == pytest.approx(expected)


def test_the_update_takes_nothing_more():
    weight = torch.zeros(2**20, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)  # as training/optimizer.py makes it
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer.step()
    assert most_allocated(profiled) < 2**12


def test_the_peak_adds_states_and_activations():
    config = config_of("GL", zero_stage=2, tensor=2)
    (count,) = parameters_by_rank(config)
    (peak,) = memory.peak_bytes(config, 4)
    assert peak == count * (2 + 4 / 4 + 12 / 4) + memory.activations(config, 4, 0)


def test_context_parallel_ranks_share_states_as_replicas_do():
    config = config_of("GL", context=2)
    (count,) = parameters_by_rank(config)
    (peak,) = memory.peak_bytes(config, 2)
    assert peak == count * (2 + 4 + 12 / 4) + memory.activations(config, 2, 0)


@pytest.mark.parametrize(
    ("stage", "dtype", "travels", "expected"),
    [
        (1, "bf16", "fp32", 0),
        (1, "bf16", "bf16", 2 + 2 / 64),
        (1, "fp32", "fp32", 0),
        (2, "bf16", "fp32", 4 + 4 + 4 / 64),
        (2, "bf16", "bf16", 2 + 2 + 2 / 64),
        (2, "fp32", "fp32", 4 + 4 + 4 / 64),
        (3, "bf16", "fp32", 4 + 4 + 4 / 64),
    ],
)
def test_what_the_reduction_takes(stage, dtype, travels, expected):
    config = config_of("G", dtype=dtype, zero_stage=stage, gradient_reduction=travels)
    assert memory.reduction(config, 1000, 64) == expected * 1000
    assert memory.reduction(config, 10**9, 64) == expected * memory.BUCKET
    config.model.hidden_size, config.model.vocab_size = 2**11, 2**16
    assert memory.reduction(config, 10**9, 64) == expected * 2**27  # one parameter


@pytest.mark.parametrize(("stage", "travels"), [(1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_without_activations_the_reduction_is_the_peak(stage, travels):
    config = config_of("G" * 8, recompute="all", zero_stage=stage, gradient_reduction=travels)
    config.train.seq_length = 16
    (count,) = parameters_by_rank(config)
    gathered = 2 * splitting.gathered(config, 64)
    expected = memory.states(config, count, stage, 64) + gathered + memory.reduction(config, count, 64)
    assert memory.peak_bytes(config, 64) == [expected]
