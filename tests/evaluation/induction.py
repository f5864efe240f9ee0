"""A model that answers associative recall by weights set by hand: whatever it misses, its memory has lost.

A token is written in bits of 1 and -1. The S layer, of two keys, puts the bits of the token before beside a token's own
(its keys and queries are constant, and one pair of channels turns by a radian a token: the key one place before fits
best). The last layer, L or F, looks for the token behind an earlier occurrence of its own (an induction head: Olsson et
al., arXiv 2209.11895) and writes its bits where the output layer reads. All tokens have equally large entries, so that
norms only scale, and softmaxes are so sharp that they choose.
"""

import math

import torch

from megahybrid.config.schema import Config, ModelConfig, RunConfig, TrainConfig
from megahybrid.mixers.attention import AttentionConfig
from megahybrid.mixers.lte import LTEConfig
from megahybrid.model.stack import Stack, build

BITS = 8
VOCAB = 2**BITS
SHARP = 200
ONE, OWN, BEFORE, FOUND = 0, slice(1, 9), slice(9, 17), slice(17, 25)  # of the residual stream
TURNING, STILL = (0, 16), slice(8, 16)  # channels of a head: the first pair, and those of pairs that hardly turn


def model(window: int, buffer: int, sinks: int = 0, last: str = "L", dtype: torch.dtype = torch.float64) -> Stack:
    config = Config(
        run=RunConfig(dir="unused"),
        model=ModelConfig(
            pattern="S" + last,
            hidden_size=32,
            vocab_size=VOCAB,
            intermediate_size=4,
            tie_embeddings=False,
            attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=32, window_size=2, rope_theta=1e30),
            lte=LTEConfig(window_size=window, buffer_size=buffer, sink_size=sinks),
        ),
        train=TrainConfig(seq_length=512, micro_batch_size=1, global_batch_size=1, steps=1, dtype="fp32"),
    )
    stack = build(config, "cpu", dtype).requires_grad_(False)
    for name, weight in stack.named_parameters():
        if "norm" not in name and "router" not in name:
            weight.zero_()
    bits = 2.0 * (torch.arange(VOCAB)[:, None] >> torch.arange(BITS) & 1) - 1
    stack.embedding.weight[:, ONE] = 1
    stack.embedding.weight[:, OWN] = bits.to(dtype)
    stack.output.weight[:, FOUND] = bits.to(dtype)
    before, found = (stack.layers[layer].mixer for layer in "01")
    unit = torch.eye(BITS, dtype=dtype)
    before.k_proj.weight[TURNING[0], ONE] = 1
    before.q_proj.weight[TURNING, ONE] = SHARP * torch.tensor([math.cos(1), -math.sin(1)], dtype=dtype)
    found.q_proj.weight[STILL, OWN] = SHARP * unit
    found.k_proj.weight[STILL, BEFORE] = unit
    for mixer, target in ((before, BEFORE), (found, FOUND)):
        mixer.v_proj.weight[STILL, OWN] = unit
        mixer.o_proj.weight[target, STILL] = unit
    return stack
