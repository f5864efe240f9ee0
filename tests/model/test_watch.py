"""What layers say of the keys that their queries see, and the most likely next token."""

import pytest
import torch

from megahybrid.model.context import Context, Watch
from megahybrid_kernels import Sequences
from tests.kernels.oracles_lte import causal_mask, eviction_mask
from tests.model import tiny

LENGTHS = (70, 1, 9, 40)


def all_pairs(count: int) -> Watch:
    places = torch.arange(count)
    return Watch(places.repeat_interleave(count), places.repeat(count))


def oracle(model, layer: str, scores: torch.Tensor | None) -> torch.Tensor:
    """bool `[heads, tokens, tokens]`, document by document."""
    mixer, total = model.layers[layer].mixer, sum(LENGTHS)
    visible = torch.zeros(2, total, total, dtype=torch.bool)
    begin = 0
    for length in LENGTHS:
        rows = slice(begin, begin + length)
        begin += length
        if scores is None:
            visible[:, rows, rows] = causal_mask(length, mixer.window_size)
        else:
            lte = mixer.lte
            visible[:, rows, rows] = eviction_mask(scores[rows], lte.window_size, lte.sink_size, lte.buffer_size)
    return visible


def test_what_is_seen_is_the_oracles_mask():
    """Every query beside every token, those of other documents and later ones included."""
    model, tokens = tiny.model("GLSFL"), tiny.tokens(LENGTHS)[:-1]
    scores = {}
    for layer in ("1", "4"):
        model.layers[layer].mixer.router.register_forward_hook(
            lambda module, given, result, layer=layer: scores.update({layer: result[0]})
        )
    with torch.no_grad():
        out = model(tokens, Context(Sequences.of(LENGTHS), watch=all_pairs(len(tokens))))
    assert set(out.aux) == {1, 2, 3, 4}  # no attention, nothing to see
    for layer, aux in out.aux.items():
        expected = oracle(model, str(layer), scores.get(str(layer)))
        assert aux.seen.dtype == torch.bool and aux.loss is None
        assert torch.equal(aux.seen.T.view_as(expected), expected), layer
    window = model.layers["1"].mixer.lte.window_size
    evicted = [(causal_mask(70) & ~oracle(model, layer, scores[layer])[:, :70, :70]).sum() for layer in scores]
    retained = [oracle(model, layer, scores[layer])[:, :70, :70].sum((1, 2)) for layer in scores]
    near = causal_mask(70, window + 1).sum()
    assert min(evicted) > 0 and all((each > near + 2 * 62).all() for each in retained), "the masks say too little"


def test_without_a_watch_evaluation_has_no_by_products():
    model, tokens = tiny.model("GLSFN"), tiny.tokens()[:-1]
    assert model(tokens, Context(Sequences.of(tiny.LENGTHS))).aux == {}


@pytest.mark.parametrize("tied", [True, False])
def test_the_most_likely_token_is_that_of_the_logits(tied):
    model, tokens = tiny.model("GLSF", tie_embeddings=tied), tiny.tokens()[:-1]
    asked = torch.tensor([5, 72, 5, 0])
    with torch.no_grad():
        out = model(tokens, Context(Sequences.of(tiny.LENGTHS)), asked=asked)
        logits = model.logits(out.hidden)
    assert out.losses is None
    assert out.likeliest.tolist() == [max(range(tiny.VOCAB), key=lambda n: float(logits[place, n])) for place in asked]
