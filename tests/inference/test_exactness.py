"""Prefill and decode against one pass over the whole sequence, at every position."""

import pytest
import torch

from tests.inference.oracle import BUFFER, PATTERNS, WINDOW, in_pieces, router_logits, tokens, whole
from tests.model import tiny

FLOAT64, FLOAT32 = 1e-9, 1e-4
LONG = 10 * (WINDOW + BUFFER)


def assert_equal(found, expected, tolerance=FLOAT64):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance


def chunks(total, size):
    return [[min(size, total - at)] for at in range(0, total, size)]


def tie(model, heads):
    """Give these heads of every LTE layer one score for all tokens, positive: their buffers see nothing but ties."""
    for block in model.layers.values():
        if hasattr(block.mixer, "router"):
            with torch.no_grad():
                block.mixer.router.projection[heads] = 0
                block.mixer.router.projection_bias[heads] = 0.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_of_any_length_then_decode(pattern):
    """Prompts of 1 to 4 windows side by side, each then token by token; the first is decode from nothing."""
    model, more = tiny.model(pattern), 2 * (WINDOW + BUFFER)
    prompts = list(range(1, 4 * WINDOW + 1))
    rows = [tokens(n + more, seed=n) for n in prompts]
    found = in_pieces(model, rows, [prompts] + [[1] * len(prompts)] * more)
    for row, logits in zip(rows, found, strict=True):
        assert_equal(logits, whole(model, row))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [1, 3, 7, WINDOW, WINDOW + BUFFER + 7])
def test_prefill_in_chunks(pattern, size):
    model, row = tiny.model(pattern), tokens(LONG)
    (found,) = in_pieces(model, [row], chunks(LONG, size))
    assert_equal(found, whole(model, row))


@pytest.mark.parametrize("size", [1, 4, LONG])
@pytest.mark.parametrize("heads", [[0], [0, 1]])
@pytest.mark.parametrize("pattern", ["L", "GLSF"])
def test_ties_of_scores(pattern, heads, size):
    """Of equal scores the earlier token stays, whatever the pieces."""
    model, row = tiny.model(pattern), tokens(LONG, seed=4)
    tie(model, heads)
    (found,) = in_pieces(model, [row], chunks(LONG, size))
    assert_equal(found, whole(model, row))
    free = tiny.model(pattern)
    assert (whole(free, row) - whole(model, row)).abs().max() > 1e-3


@pytest.mark.parametrize("sizes", [(1, 2), (5, 5), (40, 3)])
def test_other_buffers_and_sinks(sizes):
    """No room beside the sinks, hardly any, and a buffer longer than the window."""
    from megahybrid.model.stack import build

    config = tiny.config("GLSF")
    buffer, sinks = max(sizes), min(sizes)
    config.model.lte.buffer_size, config.model.lte.sink_size = buffer, sinks
    model, row = build(config, "cpu", torch.float64), tokens(LONG, seed=2)
    for size in (1, 11):
        (found,) = in_pieces(model, [row], chunks(LONG, size))
        assert_equal(found, whole(model, row))


def test_the_sequences_here_overflow_the_buffer_and_drop_tokens():
    """Otherwise the tests above would say little about eviction."""
    for pattern in ("L", "GLSF"):
        seen = []
        with router_logits(seen):
            whole(tiny.model(pattern), tokens(LONG))
        kept = (seen[0] > 0).sum(0)
        assert kept.max() > 2 * BUFFER and kept.min() < LONG


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [1, 7, 50])
def test_float32(pattern, size):
    """Up to the first token whose keep decision is within 1e-4 of flipping, which has to be late."""
    model, row, seen = tiny.model(pattern, dtype=torch.float32), tokens(LONG, seed=1), []
    with router_logits(seen):
        expected = whole(model, row)
    doubtful = [int(place) for logits in seen for place in (logits.abs() < 1e-4).any(1).nonzero()]
    until = min(doubtful, default=LONG)
    assert until > LONG // 2, f"the decision on token {until} is too close: choose another seed"
    (found,) = in_pieces(model, [row], chunks(LONG, size))
    assert_equal(found[:until], expected[:until], FLOAT32)
