"""The Triton kernels of LTE: on a GPU where there is one, else on Triton's interpreter with small shapes."""

from itertools import product

import pytest
import torch
from cases import interpreted
from oracles_lte import FLOAT32_TOLERANCE, assert_same_gradients, centred, dense_lte_attention, documents, leaf
from test_exit_positions import tied_scores

from megahybrid_kernels import Sequences
from megahybrid_kernels.exit_positions import reference as exits_reference
from megahybrid_kernels.exit_positions import triton as exits_triton
from megahybrid_kernels.lte_attention import triton as lte
from megahybrid_kernels.lte_attention import triton_columns
from megahybrid_kernels.lte_attention.reference import visible_until
from megahybrid_kernels.lte_attention.triton import Tuning
from megahybrid_kernels.tuning import Launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
# Several tiles and chunks in a few hundred tokens.
LAUNCH = Launch(16, 4, 1)
SMALL = Tuning(32, 32, 32, LAUNCH, LAUNCH, LAUNCH, LAUNCH)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(triton_columns, "CHUNK", 64)


def inputs(lengths, query_heads, heads, head_dim, score=None, dtype=torch.float32):
    tokens = sum(lengths)
    pairs = {
        name: leaf(tokens, h, head_dim, seed=i, dtype=dtype)
        for i, (name, h) in enumerate({"q": query_heads, "k": heads, "v": heads}.items())
    }
    score = (tied_scores(tokens, heads, seed=9) if score is None else score).float()
    pairs["score"] = (score.requires_grad_(), score.detach().double().requires_grad_())
    return pairs


def attend(pairs, lengths, *sizes, tune=SMALL):
    moved = [pair[0].to(DEVICE) for pair in pairs.values()]
    return lte.lte_attention(*moved, Sequences.of(lengths, DEVICE), *sizes, tune=tune).cpu()


def check(pairs, lengths, *sizes, tune=SMALL, tolerance=FLOAT32_TOLERANCE):
    """sizes: window, sinks, buffer, and the gate if it is not the paper's."""
    expected = dense_lte_attention(*(pair[1] for pair in pairs.values()), lengths, *sizes)
    assert_same_gradients(attend(pairs, lengths, *sizes, tune=tune), expected, pairs, tolerance)


SIZES = [(0, 0, None), (9, 4, None), (9, 4, 6), (0, 1, 5), (40, 2, 12), (300, 3, 4)]
LENGTHS = [(1,), (3, 1, 2, 40, 9, 70), (131, 1, 60)]


@pytest.mark.parametrize(
    "lengths, window_size, sink_size, buffer_size",
    interpreted(  # of one token all, of many sequences and of long ones every other one
        [(x, *sizes) for n, sizes in enumerate(SIZES) for x in (LENGTHS[0], LENGTHS[1 + n % 2])],
        [(x, *sizes) for x in LENGTHS for sizes in SIZES],
    ),
)
def test_outputs_and_gradients(lengths, window_size, sink_size, buffer_size):
    check(inputs(lengths, 2, 2, 16), lengths, window_size, sink_size, buffer_size)


@pytest.mark.parametrize(
    "query_heads, heads, head_dim, buffer_size",
    interpreted([(8, 2, 16, 6), (3, 1, 24, None)], [(*x, y) for x in [(8, 2, 16), (3, 1, 24)] for y in (None, 6)]),
)
def test_grouped_heads_and_odd_head_dims(query_heads, heads, head_dim, buffer_size):
    lengths = (60, 23)
    check(inputs(lengths, query_heads, heads, head_dim), lengths, 11, 2, buffer_size)


@pytest.mark.parametrize("buffer_size", [None, 6])
@pytest.mark.parametrize("fill", [-0.2, 0.3])
def test_nothing_kept_and_all_kept(fill, buffer_size):
    lengths = (5, 140)
    check(inputs(lengths, 2, 1, 16, torch.full((145, 1), fill)), lengths, 11, 0, buffer_size)


@pytest.mark.parametrize(
    "lengths, window_size, sink_size, buffer_size, groups",
    interpreted(
        [(LENGTHS[1], 9, 4, None, 1), (LENGTHS[2], 9, 4, 6, 4)],
        [(x, *sizes, groups) for x in LENGTHS for sizes in SIZES for groups in (1, 3, 4)],
    ),
)
def test_a_gate_on_the_logit(lengths, window_size, sink_size, buffer_size, groups):
    check(inputs(lengths, 2 * groups, 2, 16), lengths, window_size, sink_size, buffer_size, "logit")


@pytest.mark.parametrize(
    "lengths, window_size, sink_size, buffer_size, groups",
    interpreted(
        [(LENGTHS[1], 9, 4, 6, 3), (LENGTHS[2], 9, 4, None, 4), (LENGTHS[2], 300, 3, 4, 1)],
        [(x, *sizes, groups) for x in LENGTHS for sizes in SIZES for groups in (1, 3, 4)],
    ),
)
def test_what_queries_do_not_see(lengths, window_size, sink_size, buffer_size, groups):
    check(inputs(lengths, 2 * groups, 2, 16), lengths, window_size, sink_size, buffer_size, "counterfactual")


@pytest.mark.parametrize(
    "lengths, window_size, sink_size, buffer_size, groups",
    interpreted(
        [(LENGTHS[1], 9, 4, 6, 1), (LENGTHS[2], 0, 1, 5, 3), (LENGTHS[2], 9, 4, None, 1)],
        [(x, *sizes, groups) for x in LENGTHS for sizes in SIZES for groups in (1, 3)],
    ),
)
def test_what_a_full_buffers_scores_have_in_common(lengths, window_size, sink_size, buffer_size, groups):
    check(inputs(lengths, 2 * groups, 2, 16), lengths, window_size, sink_size, buffer_size, "displacing")


def test_where_the_buffer_has_room_to_spare_scores_keep_what_they_have_in_common():
    lengths = (60, 70)
    score = torch.rand(130, 1, generator=torch.Generator().manual_seed(5)) - 0.95
    score[60:] += 0.6
    rivals = [(score[rows.start + 2 : rows.stop - 10] > 0).sum().item() for rows in documents(lengths)]
    assert 0 < rivals[0] < 10 < rivals[1]
    check(inputs(lengths, 1, 1, 16, score), lengths, 9, 2, 12, "displacing")


def test_rising_scores_displace_all_the_time():
    lengths = (200,)
    check(inputs(lengths, 1, 1, 16, torch.linspace(0.01, 0.4, 200)[:, None]), lengths, 9, 2, 5)


def test_half_precision_with_the_tiles_of_training():
    lengths = (150, 33)
    check(inputs(lengths, 2, 2, 32, dtype=torch.float16), lengths, 20, 4, 8, tune=None, tolerance=3e-3)


def test_packed_equals_separate_and_strided_inputs():
    lengths, sizes = (70, 1, 60), (9, 4, 6)
    pairs = inputs(lengths, 2, 2, 16)
    whole = attend(pairs, lengths, *sizes)
    for rows in documents(lengths):
        part = {name: (pair[0][rows],) for name, pair in pairs.items()}
        torch.testing.assert_close(
            whole[rows], attend(part, (rows.stop - rows.start,), *sizes), rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE
        )
    q, k, v, score = (pair[0].detach() for pair in pairs.values())
    fused = torch.cat([q, k, v], 1)
    strided = {"q": (fused[:, :2],), "k": (fused[:, 2:4],), "v": (fused[:, 4:],), "score": (score,)}
    assert torch.equal(attend(strided, lengths, *sizes), whole)


@pytest.mark.parametrize("lengths", [(150, 33), (181,), (64,), (1, 2)])
def test_one_chunk_needs_no_list_of_its_own(lengths, monkeypatch):
    monkeypatch.setattr(triton_columns, "CHUNK", 4096)
    check(inputs(lengths, 2, 1, 16), lengths, 9, 4, 6)


@pytest.mark.parametrize("chunk", [64, 256])
def test_lists_hold_what_is_visible(chunk, monkeypatch):
    monkeypatch.setattr(triton_columns, "CHUNK", chunk)
    lengths, window_size, sink_size, buffer_size, queries, keys = (150, 33), 20, 4, 6, 32, 16
    score = tied_scores(183, 2, seed=1).float().to(DEVICE)
    sequences = Sequences.of(lengths, DEVICE)
    for cap in (None, buffer_size):
        exits = None
        if cap:
            exits = exits_reference.exit_positions(score, sequences, window_size, sink_size, cap).contiguous()
        part = triton_columns.partition(sequences, window_size, queries, keys, cap is not None)
        columns = triton_columns.far_columns(score, exits, sequences, part, sink_size, cap)
        until = visible_until(score, sequences, window_size, sink_size, cap).T.cpu()
        assert torch.equal(columns.until.cpu(), until.int())
        for head in range(2):
            for tile in range(part.tiles):
                i0, i1 = tile * queries, min((tile + 1) * queries, 183)
                near = max(i0 - window_size, 0) // keys * keys
                expected = [j for j in range(near) if until[head, j] > i0]
                first, count = int(columns.tile_first[head, tile]), int(columns.tile_count[head, tile])
                listed = columns.tile_lists.flatten()[first : first + count].tolist()
                assert sorted(listed) == expected
                full = int(columns.tile_full[head, tile])
                assert all(until[head, j] >= i1 for j in listed[:full])
                assert cap is None or len(listed) <= cap


EXIT_LENGTHS, EXIT_LEVELS = [(1,), (2, 1, 70, 33, 5), (129,), (64,), (64, 64)], [0, 3, 10_000]
EXIT_SIZES = [(0, 0, 1), (5, 4, 9), (9, 1, 40)]  # window, sinks, buffer
# Every pair of lengths, sizes and levels.
EXIT_PAIRS = {
    (lengths, sizes, EXIT_LEVELS[(n + m) % 3])
    for n, lengths in enumerate(EXIT_LENGTHS)
    for m, sizes in enumerate(EXIT_SIZES)
}


@pytest.mark.parametrize(
    "lengths, sizes, levels", interpreted(EXIT_PAIRS, product([*EXIT_LENGTHS, (257,)], EXIT_SIZES, EXIT_LEVELS))
)
def test_exits(lengths, sizes, levels, monkeypatch):
    for name, size in {"_OWN": 8, "_OTHERS": 16, "_BLOCKS": 4, "_PIECE": 8}.items():
        monkeypatch.setattr(exits_triton, name, size)
    # Without levels all are candidates, which fill whole groups, of 64 here.
    score = tied_scores(sum(lengths), 2, seed=levels, levels=levels or 50).to(DEVICE)
    score = score if levels else score.abs() + 0.1
    starts = torch.arange(len(lengths), device=DEVICE) * 2
    sequences = Sequences.of(lengths, DEVICE, starts)
    actual = exits_triton.exit_positions(score, sequences, *sizes)
    assert torch.equal(actual, exits_reference.exit_positions(score, sequences, *sizes))


FULL = [  # lengths, query heads, heads, head dim, window, sinks, buffer, share kept
    ((1500,), 4, 4, 64, 768, 4, None, 0.125),
    ((700, 1, 33, 2, 1301), 4, 2, 64, 768, 4, None, 0.2),
    ((2100, 37), 8, 2, 64, 300, 4, None, 1.0),
    ((2100, 37), 2, 2, 64, 300, 0, None, 0.0),
    ((2001, 95, 300), 4, 2, 64, 256, 4, 100, 0.3),
    ((2500,), 4, 1, 64, 100, 4, 512, 1.0),
    ((1500, 300), 6, 2, 128, 300, 4, 50, 0.3),
    ((900, 301), 2, 1, 256, 100, 4, None, 0.3),
    ((900, 301), 2, 2, 32, 100, 4, 20, 0.3),
    ((700, 301), 16, 1, 96, 100, 4, None, 0.3),
]


@on_a_gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)])
@pytest.mark.parametrize("gate", ["value", "counterfactual", "displacing"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_full_sizes_on_a_gpu(case, gate, dtype, tolerance):
    """Against float64 by relative norm, in the tiles that training uses, and twice the same bits."""
    lengths, query_heads, heads, head_dim, *sizes, share = case
    sizes.append(gate)
    generator = torch.Generator().manual_seed(3)
    score = (torch.rand(sum(lengths), heads, generator=generator) * 50).floor() / 50 - (1 - share)
    pairs = inputs(lengths, query_heads, heads, head_dim, score, dtype)
    sequences, actual = Sequences.of(lengths, DEVICE), []
    leaves = [pair[0].detach().to(DEVICE).requires_grad_() for pair in pairs.values()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    do = torch.randn(leaves[0].shape, generator=generator).to(DEVICE, dtype)
    for _ in range(2):
        o = lte.lte_attention(*leaves, sequences, *sizes)
        actual.append((o.detach(), *torch.autograd.grad(o, leaves, do)))
    expected = masked_attention(*exact, sequences, *sizes)
    expected = (expected.detach(), *torch.autograd.grad(expected, exact, do.double()))
    for name, first, second, truth in zip(("o", "dq", "dk", "dv", "dr"), *actual, expected, strict=True):
        assert torch.equal(first, second), name
        assert ((first.double() - truth).norm() / truth.norm()).item() <= tolerance, name


def masked_attention(q, k, v, score, sequences, window_size, sink_size, buffer_size, gate):
    """`dense_lte_attention` without its loops over tokens, with the exits of the PyTorch reference."""
    until = visible_until(score.detach(), sequences, window_size, sink_size, buffer_size).T[:, None]
    rows = torch.arange(q.shape[0], device=q.device)
    earlier = (rows <= rows[:, None]) & (sequences.index == sequences.index[:, None])
    visible = earlier & (rows[:, None] < until)
    groups, kept = q.shape[1] // k.shape[1], score.detach()
    if gate == "displacing" and buffer_size is not None:
        score = centred(score, sequences.lengths, window_size, sink_size, buffer_size)
    k, v, zero = (x.repeat_interleave(groups, 1) for x in (k, v, score - kept))
    visible = visible.repeat_interleave(groups, 0)
    logits = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
    if gate == "value":
        p = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", p, v * (1 + zero)[..., None])
    seen = (logits + zero.T[:, None]).masked_fill(~visible, -torch.inf)
    o = torch.einsum("hij,jhd->ihd", seen.softmax(-1), v)
    # Each key that is not seen, alone beside those that are.
    weight = (logits - seen.logsumexp(-1, keepdim=True)).sigmoid().detach() * (earlier & ~visible) * zero.T[:, None]
    change = torch.einsum("hij,jhd->ihd", weight, v.detach())
    return o + change - weight.sum(-1).T[..., None] * o.detach()
