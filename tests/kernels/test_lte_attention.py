import pytest
import torch
from oracles_lte import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    assert_same_gradients,
    cut,
    dense_lte_attention,
    documents,
    leaf,
    random_pieces,
    streaming_buffer,
)
from test_exit_positions import tied_scores
from test_retention_router import random_router

from megahybrid_kernels import Sequences
from megahybrid_kernels.lte_attention import LTECache, counterfactual, lte_attention, lte_attention_with_cache
from megahybrid_kernels.retention_router import (
    RouterParameters,
    RouterState,
    margin,
    retention_logits,
    retention_scores_streamed,
)

TOLERANCES = {
    torch.float64: FLOAT64_TOLERANCE,
    torch.float32: FLOAT32_TOLERANCE,
    torch.bfloat16: BFLOAT16_TOLERANCE,
}


def inputs(lengths, query_heads, heads, dtype=torch.float64, score=None):
    tokens = sum(lengths)
    pairs = {
        name: leaf(tokens, h, 8, seed=i, dtype=dtype)
        for i, (name, h) in enumerate({"q": query_heads, "k": heads, "v": heads}.items())
    }
    score = tied_scores(tokens, heads, seed=9) if score is None else score
    score = score.to(torch.promote_types(dtype, torch.float32))
    pairs["score"] = (score.requires_grad_(), score.detach().double().requires_grad_())
    return pairs


def check(pairs, lengths, window_size, sink_size, buffer_size, tolerance=FLOAT64_TOLERANCE, gate="value"):
    actual = [pair[0] for pair in pairs.values()]
    sequences = Sequences.of(lengths)
    o = lte_attention(*actual, sequences, window_size, sink_size, buffer_size, gate)
    assert o.dtype == actual[0].dtype
    expected = dense_lte_attention(*(p[1] for p in pairs.values()), lengths, window_size, sink_size, buffer_size, gate)
    assert_same_gradients(o, expected, pairs, tolerance)
    with torch.no_grad():
        torch.testing.assert_close(lte_attention(*actual, sequences, window_size, sink_size, buffer_size, gate), o)


@pytest.mark.parametrize(
    "window_size, sink_size, buffer_size",
    [(0, 0, None), (9, 0, None), (9, 4, None), (63, 2, None), (0, 1, 1), (9, 0, 5), (9, 4, 5), (9, 4, 50)],
)
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 2, 40, 9), (131, 1, 290), (257,)])
@pytest.mark.parametrize("query_heads, heads", [(2, 2), (6, 2)])
def test_outputs_and_gradients(lengths, window_size, sink_size, buffer_size, query_heads, heads):
    check(inputs(lengths, query_heads, heads), lengths, window_size, sink_size, buffer_size)


@pytest.mark.parametrize("window_size, sink_size, buffer_size", [(0, 0, None), (9, 4, None), (9, 4, 5)])
@pytest.mark.parametrize("query_heads", [2, 6])
def test_a_gate_on_the_logit(window_size, sink_size, buffer_size, query_heads):
    lengths = (131, 1, 290)
    check(inputs(lengths, query_heads, 2), lengths, window_size, sink_size, buffer_size, gate="logit")


@pytest.mark.parametrize("pairs_at_once", [counterfactual.PAIRS, 130])
@pytest.mark.parametrize("lengths", [(24, 24), (8, 8, 8, 24), (9, 31, 1)])
@pytest.mark.parametrize("query_heads", [2, 4])
def test_what_a_token_would_change_if_it_were_kept(lengths, query_heads, pairs_at_once, monkeypatch):
    """The loss is linear in the outputs, so the gradient of a token that is not kept is, beside the gate's part of the
    queries that see it, what the loss changes by when it alone is kept, too."""
    monkeypatch.setattr(counterfactual, "PAIRS", pairs_at_once)
    pairs = inputs(lengths, query_heads, 2)
    q, k, v, score = (pair[0].detach() for pair in pairs.values())
    weights = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(5))

    def loss(score, gate="value"):
        return (lte_attention(q, k, v, score, Sequences.of(lengths), 4, 1, None, gate) * weights).sum()

    gradients = {}
    for gate in ("logit", "counterfactual"):
        leaf = score.clone().requires_grad_()
        (gradients[gate],) = torch.autograd.grad(loss(leaf, gate), leaf)
    expected = torch.zeros_like(score)
    for token, head in (score <= 0).nonzero().tolist():
        kept = score.clone()
        kept[token, head] = 1.0
        expected[token, head] = loss(kept) - loss(score)
    assert (expected.abs() > 1e-3).sum() > 5
    torch.testing.assert_close(gradients["counterfactual"] - gradients["logit"], expected)


def test_what_a_token_would_change_for_queries_after_it_was_evicted():
    """With a capped buffer a positive score, too, has queries that do not see its token: o with it beside what each
    sees, one query and token after the other."""
    lengths, (window, sinks, buffer) = (31, 9), (4, 1, 3)
    pairs = inputs(lengths, 4, 2)
    q, k, v, score = (pair[0].detach() for pair in pairs.values())
    weights = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(5))
    gradients = []
    for gate in ("logit", "counterfactual"):
        leaf = score.clone().requires_grad_()
        o = lte_attention(q, k, v, leaf, Sequences.of(lengths), window, sinks, buffer, gate)
        gradients += torch.autograd.grad((o * weights).sum(), leaf)
    expected, evicted = torch.zeros_like(score), 0
    for document in documents(lengths):
        for head in range(4):
            kv = head // 2
            held, _ = streaming_buffer(score[document, kv].tolist(), window, sinks, buffer)
            for i in range(document.start, document.stop):
                rows = range(document.start, i + 1)
                seen = [j for j in rows if i - j <= window or j - document.start in held[i - document.start]]
                for j in set(rows) - set(seen):
                    evicted += bool(score[j, kv] > 0)
                    some = [*seen, j]
                    p = (k[some, kv] @ q[i, head] * 8**-0.5).softmax(0)
                    expected[j, kv] += weights[i, head] @ (p @ v[some, kv] - o[i, head].detach())
    assert evicted > 50
    torch.testing.assert_close(gradients[1] - gradients[0], expected)


@pytest.mark.parametrize("sizes", [(9, 4, 5), (4, 0, 3), (0, 1, 1), (9, 4, None), (9, 0, 500)])
@pytest.mark.parametrize("lengths", [(40, 1, 90), (200,)])
def test_what_a_full_buffers_scores_have_in_common(lengths, sizes):
    check(inputs(lengths, 4, 2), lengths, *sizes, gate="displacing")


def test_where_many_compete_for_few_places_nothing_in_common_is_left():
    """With as many scores as there are, and one place, all but its share of their mean is gone; those that the window
    still has, and sinks, keep theirs."""
    lengths, (window, sinks, buffer) = (300,), (9, 2, 3)
    score = torch.rand(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.1
    q, k, v = (pair[0].detach() for pair in list(inputs(lengths, 2, 2).values())[:3])
    found = {}
    for gate in ("counterfactual", "displacing"):
        leaf = score.clone().requires_grad_()
        o = lte_attention(q, k, v, leaf, Sequences.of(lengths), window, sinks, buffer, gate)
        (found[gate],) = torch.autograd.grad(o.square().sum(), leaf)
    rivals = slice(sinks, 300 - 1 - window)
    before, after = (found[gate][rivals].mean(0) for gate in ("counterfactual", "displacing"))
    torch.testing.assert_close(after, before / (300 - 1 - window - sinks))
    assert torch.equal(found["counterfactual"][:sinks], found["displacing"][:sinks])
    assert torch.equal(found["counterfactual"][rivals.stop :], found["displacing"][rivals.stop :])


def test_what_queries_do_not_see_takes_memory_for_one_document_at_a_time():
    assert list(counterfactual._blocks((3000, 1096, 500, 500, 3596))) == [
        (slice(0, 3000), 3000),
        (slice(3000, 4096), 1096),
        (slice(4096, 5096), 500),
        (slice(5096, 8692), 3596),
    ]


@pytest.mark.parametrize("buffer_size", [None, 6])
@pytest.mark.parametrize("fill", [-0.2, 0.0, 0.3])
def test_nothing_kept_and_all_kept(fill, buffer_size):
    lengths = (5, 290)
    check(inputs(lengths, 4, 2, score=torch.full((295, 2), fill)), lengths, 11, 3, buffer_size)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, sparse):
    lengths = (290, 14)
    score = tied_scores(304, 2, seed=4, levels=40) - (0.22 if sparse else 0)
    check(inputs(lengths, 4, 2, dtype, score), lengths, 9, 4, None, TOLERANCES[dtype])


def test_heads_that_keep_very_different_numbers():
    lengths = (400,)
    score = torch.full((400, 3), -0.1)
    score[7, 1] = score[::5, 2] = 0.1
    check(inputs(lengths, 3, 3, score=score), lengths, 9, 0, None)


def test_packed_equals_separate():
    lengths = (131, 1, 290)
    pairs = inputs(lengths, 4, 2)
    whole = lte_attention(*(p[0] for p in pairs.values()), Sequences.of(lengths), 9, 4, 6)
    for rows in documents(lengths):
        alone = lte_attention(*(p[0][rows] for p in pairs.values()), Sequences.of([rows.stop - rows.start]), 9, 4, 6)
        torch.testing.assert_close(whole[rows], alone, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("levels", [4, 7, 10_000])
@pytest.mark.parametrize(
    "window_size, sink_size, buffer_size", [(6, 0, 1), (6, 4, 5), (9, 2, 8), (20, 4, 30), (40, 4, 300)]
)
def test_pieces_with_a_cache_equal_one_pass(window_size, sink_size, buffer_size, levels):
    delay, heads = 6, 2
    pieces = random_pieces(count=3, rounds=16, seed=levels + window_size)
    lengths = tuple(map(sum, zip(*pieces, strict=True)))
    score = tied_scores(sum(lengths), heads, seed=levels, levels=levels)
    q, k, v, score = (p[1].detach() for p in inputs(lengths, 4, heads, score=score).values())
    expected = dense_lte_attention(q, k, v, score, lengths, window_size, sink_size, buffer_size)
    # Rows without a score yet hold NaN: nothing may read them.
    late = torch.cat(
        [torch.cat([torch.full((delay, heads), torch.nan), score[r]])[: r.stop - r.start] for r in documents(lengths)]
    )
    cache = LTECache.empty(3, heads, 8, window_size, buffer_size, dtype=q.dtype)
    ends = torch.zeros(3, dtype=torch.int64)
    for (sequences, rows), new in zip(cut(pieces), pieces, strict=True):
        o, cache = lte_attention_with_cache(
            q[rows], k[rows], v[rows], late[rows], cache, sequences, window_size, sink_size, buffer_size, delay
        )
        torch.testing.assert_close(o, expected[rows], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)
        ends += torch.tensor(new)
        for n, document in enumerate(documents(lengths)):
            for h in range(heads):
                held, _ = streaming_buffer(score[document, h].tolist(), window_size, sink_size, buffer_size)
                found = cache.buffer_positions[n, h]
                assert sorted(found[found >= 0].tolist()) == held[ends[n]]


def test_streamed_router_and_cache_equal_the_full_pass_with_exits():
    window_size, sink_size, buffer_size, heads, head_dim = 9, 4, 8, 2, 8
    parameters = random_router(heads, head_dim, seed=2)
    delay = margin(3, 2)
    pieces = random_pieces(count=4, rounds=20, seed=11)
    lengths = tuple(map(sum, zip(*pieces, strict=True)))
    q, k, v, rotated = (leaf(sum(lengths), h, head_dim, seed=i)[1].detach() for i, h in enumerate((4, 2, 2, 2)))
    whole = Sequences.of(lengths)
    score = torch.sigmoid(retention_logits(k, v, parameters, whole)) - 0.5
    assert 0.2 < (score > 0).double().mean() < 0.8
    expected = lte_attention(q, rotated, v, score, whole, window_size, sink_size, buffer_size)
    uncapped = lte_attention(q, rotated, v, score, whole, window_size, sink_size)
    assert (expected - uncapped).abs().max() > 1e-3, "the cap must bite here"
    cache = LTECache.empty(4, heads, head_dim, window_size, buffer_size, dtype=q.dtype)
    state = RouterState.empty(4, parameters)
    for sequences, rows in cut(pieces):
        late, state = retention_scores_streamed(k[rows], v[rows], parameters, sequences, state)
        o, cache = lte_attention_with_cache(
            q[rows], rotated[rows], v[rows], late, cache, sequences,
            window_size, sink_size, buffer_size, delay,
        )  # fmt: skip
        torch.testing.assert_close(o, expected[rows], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


def test_gradients_through_the_cache():
    lengths = (45, 8)
    pairs = inputs(lengths, 4, 2)
    q, k, v, score = (p[0] for p in pairs.values())
    late = torch.cat([torch.cat([torch.zeros(6, 2), score[r]])[: r.stop - r.start] for r in documents(lengths)])
    cache = LTECache.empty(2, 2, 8, 9, 5, dtype=torch.float64)
    o, _ = lte_attention_with_cache(q, k, v, late, cache, Sequences.of(lengths), 9, 4, 5, 6)
    expected = dense_lte_attention(*(p[1] for p in pairs.values()), lengths, 9, 4, 5)
    pairs.pop("score")
    assert_same_gradients(o, expected, pairs, FLOAT64_TOLERANCE)


def test_refuses_what_does_not_fit():
    q, score = torch.zeros(5, 2, 8), torch.zeros(5, 2)
    sequences = Sequences.of([5])
    with pytest.raises(ValueError, match="sinks"):
        lte_attention(q, q, q, score, sequences, 4, 4, 3)
    with pytest.raises(ValueError, match="fit together"):
        lte_attention(q, q, q, score[:, :1], sequences, 4, 4)
    cache = LTECache.empty(1, 2, 8, 5, 8, dtype=q.dtype)
    with pytest.raises(ValueError, match="late"):
        lte_attention_with_cache(q, q, q, score, cache, sequences, 5, 4, 8, 6)
    with pytest.raises(ValueError, match="window, buffer"):
        lte_attention_with_cache(q, q, q, score, cache, sequences, 9, 4, 8, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu():
    lengths, (window_size, sink_size, buffer_size) = (131, 1, 290), (9, 4, 8)
    sequences = Sequences.of(lengths, "cuda")
    q, k, v = (leaf(422, h, 8, seed=i, dtype=torch.float32)[0].detach().cuda() for i, h in enumerate((4, 2, 2)))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    parameters = RouterParameters(
        *torch.utils._pytree.tree_map(lambda x: x.float().cuda(), tuple(random_router(2, 8, 1)))
    )
    cache = LTECache.empty(3, 2, 8, window_size, buffer_size, dtype=q.dtype, device="cuda")
    state = RouterState.empty(3, parameters)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        score = torch.sigmoid(retention_logits(k, v, parameters, sequences)) - 0.5
        o = lte_attention(q, k, v, score, sequences, window_size, sink_size, buffer_size)
        o.sum().backward()
        late, _ = retention_scores_streamed(k, v, parameters, sequences, state)
        cached, _ = lte_attention_with_cache(
            q, k, v, late, cache, sequences, window_size, sink_size, buffer_size, margin(3, 2)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(cached, o, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


def test_sequences_that_begin_need_no_cache():
    q, k, v = torch.randn(3, 9, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = 3, 1, 2, 2
    found = lte_attention_with_cache(q, k, v, q[..., 0], None, Sequences.of([9]), *sizes)
    cache = LTECache.empty(1, 2, 8, 3, 2, dtype=q.dtype)
    expected = lte_attention_with_cache(q, k, v, q[..., 0], cache, Sequences.of([9]), *sizes)
    assert all(map(torch.equal, (found[0], *vars(found[1]).values()), (expected[0], *vars(expected[1]).values())))
    with pytest.raises(ValueError, match="no cache of their earlier tokens"):
        lte_attention_with_cache(q, k, v, q[..., 0], None, Sequences.of([9], starts=torch.tensor([4])), *sizes)
