"""Norms of queries and keys: against plain float64 from a layer's weights, and what they make of larger weights."""

import pytest
import torch
import torch.nn.functional as F

from megahybrid.config.schema import ParallelConfig
from megahybrid.model.context import Context
from megahybrid.parallel import groups
from megahybrid_kernels import Sequences
from tests.mixers.by_hand import rotated
from tests.model import tiny

LENGTHS = (70, 1, 23)
HEAD_DIM, GROUP = 8, 2


@pytest.fixture(scope="module", autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


def layer_and_input(letter, **options):
    torch.manual_seed(0)
    mixer = tiny.model(letter, **options).requires_grad_(False).layers["0"].mixer
    for name in ("q_norm", "k_norm"):
        if hasattr(mixer, name):
            getattr(mixer, name).copy_(torch.linspace(0.5, 1.5, HEAD_DIM))
    return mixer, torch.randn(sum(LENGTHS), 1, 16, dtype=torch.float64)


def unit(x, eps):
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def test_full_attention_is_what_its_weights_say():
    mixer, x = layer_and_input("F", qk_norm=True)
    found, *_ = mixer(x, Context(Sequences.of(LENGTHS)))
    outputs = []
    for part in x[:, 0].split(LENGTHS):
        q, k, v = (F.linear(part, getattr(mixer, f"{each}_proj").weight).unflatten(1, (-1, HEAD_DIM)) for each in "qkv")
        q, k = unit(q, 1e-6) * mixer.q_norm, unit(k, 1e-6) * mixer.k_norm
        q, k = (rotated(each, [len(part)]) for each in (q, k))
        k, v = (each.repeat_interleave(GROUP, 1) for each in (k, v))
        logits = torch.einsum("ihd,jhd->hij", q, k) / HEAD_DIM**0.5
        weights = logits.masked_fill(torch.ones(len(part), len(part)).triu(1).bool(), -torch.inf).softmax(-1)
        outputs.append(F.linear(torch.einsum("hij,jhd->ihd", weights, v).flatten(1), mixer.o_proj.weight))
    assert torch.allclose(found[:, 0], torch.cat(outputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("letter", "FSLN")
def test_larger_weights_change_nothing(letter):
    changes = {}
    for normed in (True, False):
        mixer, x = layer_and_input(letter, qk_norm=normed)
        before, *_ = mixer(x, Context(Sequences.of(LENGTHS)))
        mixer.q_proj.weight *= 3
        mixer.k_proj.weight *= 2
        after, *_ = mixer(x, Context(Sequences.of(LENGTHS)))
        changes[normed] = float((after - before).abs().max() / before.abs().max())
    assert changes[True] < 1e-4 and changes[False] > 0.1
