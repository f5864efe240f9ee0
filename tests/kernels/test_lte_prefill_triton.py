"""Prefill with the Triton kernels of training: on a GPU where there is one, else on Triton's interpreter."""

import itertools

import pytest
import torch
from cases import interpreted
from oracles_lte import FLOAT32_TOLERANCE, leaf
from test_exit_positions import tied_scores
from test_retention_router import leaves, random_router

from megahybrid_kernels import Sequences
from megahybrid_kernels.lte_attention import LTECache, reference
from megahybrid_kernels.lte_attention.triton_prefill import lte_attention_piece
from megahybrid_kernels.retention_router import RouterParameters, RouterState, margin
from megahybrid_kernels.retention_router import reference as router_reference
from megahybrid_kernels.retention_router.triton_prefill import retention_scores_first

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(*tensors):
    return [x.to(DEVICE) for x in tensors]


def by_position(cache):
    """The cache's tensors, its buffer's slots in order of position."""
    order = cache.buffer_positions.argsort(dim=2, stable=True)
    parts = {name: x.cpu() for name, x in vars(cache).items()}
    for name in ("buffer_k", "buffer_v", "buffer_score", "buffer_positions"):
        index = order.cpu()
        if parts[name].dim() == 4:
            index = index[..., None].expand_as(parts[name])
        parts[name] = parts[name].gather(2, index)
    return parts


def assert_same_cache(found, expected):
    found, expected = by_position(found), by_position(expected)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
        assert found[name].dtype == x.dtype


def pieces_of(lengths, cuts):
    """Tokens of each sequence in each round; all begin in the first one."""
    ends = [[max(1, length * cut // 100) for length in lengths] for cut in cuts]
    pairs = itertools.pairwise(ends)
    rounds = [ends[0], *([b - a for a, b in zip(one, other, strict=True)] for one, other in pairs)]
    return [[max(1, n) for n in each] for each in rounds]


@pytest.mark.parametrize(
    "window_size, sink_size, buffer_size, levels, cuts",
    [
        (6, 0, 1, 6, (100,)),
        (6, 4, 5, 2, (30, 100)),
        (9, 2, 8, 6, (10, 12, 60, 100)),
        (20, 4, 30, 10_000, (10, 60, 100)),
        (40, 4, 300, 6, (100,)),
    ],
)
def test_pieces_equal_the_reference(window_size, sink_size, buffer_size, levels, cuts):
    """Prompts shorter than the scores' delay, than the window, and such that overflow the buffer, side by side."""
    lengths, delay, heads, head_dim, query_heads = (5, 90, 1, 17), 6, 2, 16, 4
    rounds = pieces_of(lengths, cuts)
    caches = [LTECache.empty(len(lengths), heads, head_dim, window_size, buffer_size, dtype=torch.float32)] * 2
    caches[1] = LTECache(*moved(*vars(caches[1]).values()))
    starts = torch.zeros(len(lengths), dtype=torch.int64)
    for number, new in enumerate(rounds):
        tokens = sum(new)
        q, k, v = (
            leaf(tokens, h, head_dim, seed=10 * number + i, dtype=torch.float32)[0].detach()
            for i, h in enumerate((query_heads, heads, heads))
        )
        late = tied_scores(tokens, heads, seed=number, levels=levels).float()
        first = torch.cat([torch.arange(n) + int(at) < delay for n, at in zip(new, starts, strict=True)])
        late[first] = torch.nan
        sizes = (window_size, sink_size, buffer_size, delay)
        expected, caches[0] = reference.lte_attention_with_cache(
            q, k, v, late, caches[0], Sequences.of(new, starts=starts), *sizes
        )
        sequences = Sequences.of(new, DEVICE, starts.to(DEVICE) if number else None)
        with torch.no_grad():
            found, caches[1] = lte_attention_piece(*moved(q, k, v, late), caches[1], sequences, *sizes)
        torch.testing.assert_close(found.cpu(), expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
        assert_same_cache(caches[1], caches[0])
        starts = starts + torch.tensor(new)


# Around the delay of the scores (6), the window and its end (6, 7), a full buffer (11), and with the sinks (13).
@pytest.mark.parametrize("tokens", interpreted({1, 5, 6, 7, 11, 12, 13, 28}, range(1, 29)))
def test_prompts_of_one_token_to_four_windows_and_what_follows(tokens):
    """Alone, since a longer prompt beside it may take another path; 11 tokens just fill window and buffer."""
    sizes, generator = (6, 2, 5, 6), torch.Generator().manual_seed(tokens)
    cache = fast = LTECache.empty(1, 2, 16, 6, 5, dtype=torch.float32)
    for start, new in ((0, tokens), (tokens, 1), (tokens + 1, 9)):
        q, k, v = (torch.randn(new, heads, 16, generator=generator) for heads in (4, 2, 2))
        late, starts = 0.1 + torch.rand(new, 2, generator=generator), torch.tensor([start])
        expected, cache = reference.lte_attention_with_cache(
            q, k, v, late, cache, Sequences.of([new], starts=starts), *sizes
        )
        sequences = Sequences.of([new], DEVICE, starts.to(DEVICE) if start else None)
        found, fast = lte_attention_piece(*moved(q, k, v, late), fast, sequences, *sizes)
        torch.testing.assert_close(found.cpu(), expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
        assert_same_cache(fast, cache)


def test_sequences_that_begin_beside_others_that_go_on():
    heads, head_dim, sizes = 2, 16, (6, 2, 5, 6)
    cache = LTECache.empty(3, heads, head_dim, 6, 5, dtype=torch.float32)
    starts, fast = torch.tensor([0, 0, 0]), LTECache(*moved(*vars(cache).values()))
    # The second sequence begins in the second round: until then its rows are those of an empty cache.
    for number, new in enumerate([(40, 1, 9), (1, 33, 1), (1, 1, 8)]):
        tokens = sum(new)
        q, k, v = (torch.randn(tokens, h, head_dim, generator=torch.Generator().manual_seed(number)) for h in (4, 2, 2))
        late = tied_scores(tokens, heads, seed=number, levels=4).float()
        expected, cache = reference.lte_attention_with_cache(
            q, k, v, late, cache, Sequences.of(new, starts=starts), *sizes
        )
        found, fast = lte_attention_piece(
            *moved(q, k, v, late), fast, Sequences.of(new, DEVICE, starts.to(DEVICE)), *sizes
        )
        torch.testing.assert_close(found.cpu(), expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
        assert_same_cache(fast, cache)
        starts = starts + torch.tensor(new)
        if number == 0:
            empty = LTECache.empty(3, heads, head_dim, 6, 5, dtype=torch.float32)
            for mine, none in zip(vars(cache).values(), vars(empty).values(), strict=True):
                mine[1] = none[1]
            for mine, none in zip(vars(fast).values(), vars(empty).values(), strict=True):
                mine[1] = none[1].to(DEVICE)
            starts[1] = 0


@pytest.mark.parametrize("kernel_size, dilation", [(3, 2), (5, 1)])
@pytest.mark.parametrize("lengths, heads, head_dim", [((1,), 1, 16), ((3, 1, 2, 40, 90), 2, 8), ((57, 64), 3, 24)])
def test_the_routers_first_piece_equals_the_streamed_path(lengths, heads, head_dim, kernel_size, dilation):
    parameters = leaves(random_router(heads, head_dim, 1, kernel_size), torch.float32)
    parameters = RouterParameters(
        *(tuple(y.detach() for y in x) for x in parameters[:2]), *(x.detach() for x in parameters[2:])
    )
    k, v = (leaf(sum(lengths), heads, head_dim, seed=i, dtype=torch.float32)[0].detach() for i in range(2))
    sequences, late = Sequences.of(lengths), margin(kernel_size, dilation)
    state = RouterState.empty(len(lengths), parameters, dilation)
    expected, state = router_reference.retention_scores_streamed(k, v, parameters, sequences, state, dilation)
    on_device = RouterParameters(*(tuple(moved(*x)) for x in parameters[:2]), *moved(*parameters[2:]))
    with torch.no_grad():
        scores, fast = retention_scores_first(*moved(k, v), on_device, Sequences.of(lengths, DEVICE), dilation)
    known = sequences.offsets >= late
    torch.testing.assert_close(scores.cpu()[known], expected[known], rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    for one, other in zip(fast.rows, state.rows, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one.cpu(), other, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("lengths", [(2,), (33, 1, 5, 4)])
def test_the_routers_rows_in_half_precision(lengths):
    heads, head_dim = 2, 24
    parameters = leaves(random_router(heads, head_dim, 1), torch.float16)
    fused = torch.randn(sum(lengths), 3 * heads, head_dim, generator=torch.Generator().manual_seed(2)).half()
    k, v = fused[:, :heads], fused[:, heads : 2 * heads]
    state = RouterState.empty(len(lengths), parameters)
    with torch.no_grad():
        _, state = router_reference.retention_scores_streamed(k, v, parameters, Sequences.of(lengths), state)
        on_device = RouterParameters(*(tuple(moved(*x)) for x in parameters[:2]), *moved(*parameters[2:]))
        k, v = (x.to(DEVICE)[:, part] for x, part in ((fused, slice(heads)), (fused, slice(heads, 2 * heads))))
        _, fast = retention_scores_first(k, v, on_device, Sequences.of(lengths, DEVICE))
    assert torch.equal(fast.rows[0].cpu(), state.rows[0])
    for one, other in zip(fast.rows[1:], state.rows[1:], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.cpu(), other, rtol=5e-3, atol=5e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("starts", [None, (0, 5000)])
def test_nothing_waits_for_the_gpu(starts):
    lengths, heads, head_dim = (3000, 700), 2, 64
    cache = LTECache.empty(2, heads, head_dim, 100, 50, dtype=torch.bfloat16, device="cuda")
    sequences = Sequences.of(lengths, "cuda", None if starts is None else torch.tensor(starts, device="cuda"))
    q, k, v = (torch.randn(sequences.tokens, h, head_dim, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    score = torch.rand(sequences.tokens, heads, device="cuda") - 0.5
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            lte_attention_piece(q, k, v, score, cache, sequences, 100, 4, 50, 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
