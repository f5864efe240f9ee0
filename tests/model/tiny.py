"""Tiny models and batches for the tests."""

import torch

from megahybrid.config.schema import Config, ModelConfig, RunConfig, TrainConfig
from megahybrid.mixers.attention import AttentionConfig
from megahybrid.mixers.gdn import GDNConfig
from megahybrid.mixers.lte import LTEConfig
from megahybrid.mixers.nsa import NSAConfig
from megahybrid.model.context import Context
from megahybrid.model.stack import build
from megahybrid_kernels import Sequences, dropout_keys

VOCAB = 40
LENGTHS = (23, 1, 9, 40)


def config(pattern, dropout=0.0, recompute="none", train_cap=False, gate="value", tie_embeddings=True, qk_norm=False):
    return Config(
        run=RunConfig(dir="unused"),
        model=ModelConfig(
            pattern=pattern,
            hidden_size=16,
            vocab_size=VOCAB,
            intermediate_size=24,
            tie_embeddings=tie_embeddings,
            init_std=0.3,  # large, so that every term of a gradient shows
            gdn=GDNConfig(num_heads=2, head_dim=4, value_head_dim=6),
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window_size=7, qk_norm=qk_norm),
            lte=LTEConfig(window_size=7, buffer_size=5, sink_size=2, dropout=dropout, train_cap=train_cap, gate=gate),
            nsa=NSAConfig(
                num_heads=4, num_kv_heads=2, head_dim=8, block_size=16, num_blocks=4, window_size=21, qk_norm=qk_norm
            ),
        ),
        train=TrainConfig(
            seq_length=64, micro_batch_size=1, global_batch_size=1, steps=1, dtype="fp32", recompute=recompute
        ),
    )


def model(pattern, dtype=torch.float64, **options):
    return build(config(pattern, **options), "cpu", dtype)


def tokens(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (sum(lengths) + 1,), generator=generator)


def training_context(lengths=LENGTHS, step=3):
    count = sum(lengths)
    keys = dropout_keys(torch.zeros(count, dtype=torch.int64), torch.arange(count), 11, step, 8)
    return Context(Sequences.of(lengths), keys)
