"""The exported model against the training model: whole, in pieces, step by step and padded."""

import random

import pytest
import torch

import megahybrid.hf.layers_megahybrid as layers
from tests.hf.tiny import expected_logits, pair, random_tokens

PATTERNS = ["G", "L", "S", "F", "GL", "GLSF"]
# Window + buffer of L is 13 tokens, the window of S 7: far beyond both.
LENGTH = 90


def close(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=0, atol=tolerance), float((found - expected).abs().max())


@pytest.fixture(params=["plain", "kernels"])
def without_and_with_kernels(request, monkeypatch):
    """Once as where megahybrid_kernels is not installed."""
    if request.param == "plain":
        monkeypatch.setattr(layers, "packed_gated_delta_rule", None)
    else:
        assert layers.packed_gated_delta_rule is not None


def in_pieces(model, rows, sizes, mask=None):
    cache, logits, at = None, [], 0
    for size in sizes:
        piece = {} if mask is None else {"attention_mask": mask[:, : at + size]}
        out = model(rows[:, at : at + size], past_key_values=cache, use_cache=True, **piece)
        cache, at = out.past_key_values, at + size
        logits.append(out.logits)
    assert at == rows.shape[1]
    return torch.cat(logits, 1)


@pytest.mark.usefixtures("without_and_with_kernels")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [256, 8])
def test_whole_sequences(pattern, block, monkeypatch):
    monkeypatch.setattr(layers, "QUERY_BLOCK", block)
    monkeypatch.setattr(layers, "CHUNK", block)
    model, exported = pair(pattern)
    rows = torch.stack([random_tokens(LENGTH, seed) for seed in (1, 2)])
    found = exported(rows, use_cache=False)
    assert found.past_key_values is None
    for row, tokens in zip(found.logits, rows, strict=True):
        close(row, expected_logits(model, tokens))
