"""Memory estimates against what a forward pass really leaves allocated."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megahybrid.config.schema import AttentionConfig, Config, GDNConfig, LTEConfig, ModelConfig, RunConfig, TrainConfig
from megahybrid.model.context import Context, dropout_keys
from megahybrid.model.stack import build
from megahybrid.scaling import memory
from megahybrid_kernels import Sequences

LENGTH = 512


def config_of(pattern, dtype="bf16", recompute="none", dropout=0.1, kv_heads=4):
    return Config(
        run=RunConfig(dir="unused"),
        model=ModelConfig(
            pattern=pattern,
            hidden_size=256,
            vocab_size=1024,
            gdn=GDNConfig(num_heads=4, head_dim=64, value_head_dim=96),
            attention=AttentionConfig(num_heads=4, num_kv_heads=kv_heads, head_dim=64, window_size=100),
            lte=LTEConfig(window_size=63, buffer_size=64, dropout=dropout),
        ),
        train=TrainConfig(
            seq_length=LENGTH, micro_batch_size=1, global_batch_size=1, steps=1, dtype=dtype, recompute=recompute
        ),
    )


def kept_bytes(config):
    """Bytes that are allocated in a forward pass and still held after it."""
    model = build(config, "cpu", torch.bfloat16 if config.train.dtype == "bf16" else torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith("projection_bias"):
            weight.data.fill_(100.0)  # all kept: on a CPU attention leaves out columns that no head keeps
    tokens = torch.arange(LENGTH + 1) % config.model.vocab_size
    keys = dropout_keys(0, 1, torch.zeros(LENGTH, dtype=torch.int64), torch.arange(LENGTH))
    context = Context(Sequences.of((LENGTH,)), keys)
    model(tokens[:-1], context, tokens[1:])  # what is cached for later passes does not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = model(tokens[:-1], context, tokens[1:])
    assert out.losses.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


def layer_bytes(letter, **options):
    """What one layer more keeps."""
    return kept_bytes(config_of(letter * 3, **options)) - kept_bytes(config_of(letter * 2, **options))


def estimated(letter, **options):
    more, fewer = (memory.activations(config_of(letter * count, **options)) for count in (3, 2))
    return more.kept - fewer.kept


# On a GPU in bf16 attention without eviction is another op than here; fp32 is the same everywhere.
@pytest.mark.parametrize(
    ("letter", "options"),
    [
        ("G", {"dtype": "bf16"}),
        ("G", {"dtype": "fp32"}),
        ("L", {"dtype": "bf16"}),
        ("L", {"dtype": "fp32"}),
        ("L", {"dtype": "bf16", "dropout": 0.0}),
        ("L", {"dtype": "bf16", "kv_heads": 2}),
        ("S", {"dtype": "fp32"}),
        ("F", {"dtype": "fp32"}),
        ("F", {"dtype": "fp32", "kv_heads": 2}),
    ],
)
def test_a_layers_activations_are_what_it_leaves_allocated(letter, options):
    assert layer_bytes(letter, **options) == pytest.approx(estimated(letter, **options), rel=0.05)


def test_with_recompute_a_layer_keeps_its_input():
    assert layer_bytes("G", recompute="all") == pytest.approx(2 * 256 * LENGTH, rel=0.05)
    three, two = (memory.activations(config_of("G" * count)) for count in (3, 2))
    assert three.recomputed - two.recomputed == 2 * 256 * LENGTH
    assert three.peak(recompute=True) < three.peak(recompute=False)


def test_zero_splits_what_its_stage_says():
    bf16, fp32 = config_of("G"), config_of("G", dtype="fp32")
    assert memory.states(bf16, 1000, 1, 1) == 1000 * (2 + 4 + 12)
    assert memory.states(bf16, 1000, 1, 8) == 1000 * (2 + 4 + 1.5)
    assert memory.states(bf16, 1000, 2, 8) == 1000 * (2 + 0.5 + 1.5)
    assert memory.states(bf16, 1000, 3, 8) == 1000 * 18 / 8
    assert memory.states(fp32, 1000, 1, 8) == 1000 * (4 + 4 + 1.5)
