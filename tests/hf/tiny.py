"""Tiny models in both forms."""

import torch

from megahybrid.hf.configuration_megahybrid import MegahybridConfig
from megahybrid.hf.modeling_megahybrid import MegahybridForCausalLM
from megahybrid.hf.naming import exported_config, exported_name
from megahybrid.model.context import Context
from megahybrid.model.stack import build
from megahybrid_kernels import Sequences
from tests.model import tiny


def pair(pattern, dtype=torch.float64, **options):
    """A training model and its exported form, with the same weights; the longest pattern has norms of queries and
    keys."""
    config = tiny.config(pattern, qk_norm=pattern == "GLSFN", **options)
    model = build(config, "cpu", dtype)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm", "k_norm")):
            weight.data.copy_(torch.linspace(0.5, 1.5, len(weight)))
    exported = MegahybridForCausalLM(MegahybridConfig(**exported_config(config))).to(dtype).eval()
    weights = {exported_name(name): weight for name, weight in model.state_dict().items()}
    missing, unexpected = exported.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    exported.tie_weights()
    return model.requires_grad_(False), exported.requires_grad_(False)


def expected_logits(model, tokens):
    """The training model's logits `[T, vocabulary]` of one sequence int64 `[T]`, by inference's rule."""
    return model.logits(model(tokens, Context(Sequences.of([len(tokens)]))).hidden)


def random_tokens(count, seed=1):
    return tiny.tokens([count], seed)[:-1]
