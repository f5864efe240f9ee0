"""The Triton kernels of native sparse attention: on a GPU where there is one, else on Triton's interpreter."""

import math
from types import SimpleNamespace

import pytest
import torch
from cases import interpreted
from oracles_lte import FLOAT32_TOLERANCE
from oracles_nsa import (
    chosen_blocks,
    flipped,
    joint_blocks,
    near_selection,
    oracle_attention,
    oracle_scores,
    oracle_selection,
)

from megahybrid_kernels import Sequences
from megahybrid_kernels.native_sparse_attention import reference, triton_backward, triton_score
from megahybrid_kernels.native_sparse_attention import triton as nsa
from megahybrid_kernels.native_sparse_attention.triton_pool import pool
from megahybrid_kernels.native_sparse_attention.triton_union import union
from megahybrid_kernels.tuning import Launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture
def joined_in_python(monkeypatch):
    """Sorting takes most of the time on Triton's interpreter."""
    if DEVICE == "cpu":
        for module in (nsa, triton_backward):
            monkeypatch.setattr(module, "union", joint_blocks)


def inputs(lengths, query_heads, heads, head_dim, dtype=torch.float32):
    generator, tokens = torch.Generator().manual_seed(7), sum(lengths)
    shapes = ((query_heads, head_dim), (heads, head_dim), (heads, head_dim), (query_heads, 3))
    q, k, v, gates = (torch.randn(tokens, *shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v, gates.sigmoid()


def attend(tensors, lengths, *sizes, selection=None):
    """(o, selection) and what the backward pass is given, on the CPU."""
    q, k, v, gates = (x.to(DEVICE) for x in tensors)
    shape = nsa.Shape.of(q, k, *sizes[:2])
    selection = selection if selection is None else selection.to(DEVICE)
    o, selection, saved = nsa._forward(
        shape, q, k, v, gates, Sequences.of(lengths, DEVICE), sizes[2], selection, save=True
    )
    return o.cpu(), selection.cpu(), nsa.Saved(*(x.cpu() for x in saved))


def select(q, k, lengths, *sizes, rows=None):
    rows = rows or (0, sum(lengths))
    return nsa.select_blocks(q.to(DEVICE), k.to(DEVICE), Sequences.of(lengths, DEVICE), *sizes, rows).cpu()


def lse(logits):
    """In powers of two; +inf of nothing."""
    return logits.logsumexp(-1) / math.log(2) if len(logits) else torch.tensor(torch.inf, dtype=torch.float64)


# Lengths, query and KV heads, head_dim; block_size, num_blocks, window_size.
FEW = [((1, 130, 15, 16, 17), 3, 1, 16, 16, 5, 20)]
EVERY = [
    *FEW,
    ((300, 33), 4, 2, 24, 16, 6, 40),
    ((300, 33), 1, 1, 16, 16, 3, 16),
    ((63, 64, 65, 127, 128, 200), 2, 2, 16, 32, 4, 1),
    ((400,), 16, 1, 16, 64, 4, 512),
    ((1,) * 20, 2, 1, 16, 64, 16, 512),
]


@pytest.mark.parametrize(
    "lengths, query_heads, heads, head_dim, block_size, num_blocks, window_size", interpreted(FEW, EVERY)
)
def test_selection_output_and_what_is_saved(lengths, query_heads, heads, head_dim, block_size, num_blocks, window_size):
    tensors = inputs(lengths, query_heads, heads, head_dim)
    q, k, v, gates = tensors
    o, selection, saved = attend(tensors, lengths, block_size, num_blocks, window_size)
    assert selection.dtype == torch.int32
    assert torch.equal(selection, oracle_selection(q, k, lengths, block_size, num_blocks))
    exact = [x.double() for x in (q, k, v)]
    tolerance = {"rtol": FLOAT32_TOLERANCE, "atol": FLOAT32_TOLERANCE}
    sizes = (lengths, block_size, window_size)
    torch.testing.assert_close(o.double(), oracle_attention(*exact, gates.double(), selection, *sizes), **tolerance)
    for number, branch in enumerate((saved.o_compressed, saved.o_selected, saved.o_window)):
        alone = torch.zeros(gates.shape, dtype=torch.float64)
        alone[..., number] = 1
        torch.testing.assert_close(branch.double(), oracle_attention(*exact, alone, selection, *sizes), **tolerance)
    # A last token of the longest document and the first of all, each in its first head.
    for row in (lengths[0] + max(lengths) - 1 if lengths[0] < max(lengths) else max(lengths) - 1, 0):
        begin = Sequences.of(lengths).begins[row].item()
        t, query = row - begin, q[row, 0].double() / head_dim**0.5
        keys = k[begin : row + 1, 0].double()
        blocks = [n for n in selection[row, 0].tolist() if n >= 0]
        chosen = [j for n in blocks for j in range(n * block_size, (n + 1) * block_size) if j <= t]
        means = reference.pool(
            k[begin : row + 1, 0][: (t + 1) // block_size * block_size].unflatten(0, (-1, block_size))
        )
        seen = (means.double(), keys[chosen], keys[-window_size:])
        for actual, part in zip((saved.lse_compressed, saved.lse_selected, saved.lse_window), seen, strict=True):
            torch.testing.assert_close(actual[row, 0].double(), lse(part @ query), **tolerance)


def test_means_have_the_references_bits():
    lengths, x = (1, 70, 32, 31), torch.randn(134, 2, 24)
    for block_size in (16, 32):
        sequences = Sequences.of(lengths, DEVICE)
        pooled = pool(x.to(DEVICE), sequences, block_size).cpu()
        first = 0
        for rows in x.split(lengths):
            blocks = len(rows) // block_size
            expected = reference.pool(rows[: blocks * block_size].unflatten(0, (blocks, block_size)))
            assert torch.equal(pooled[first : first + blocks], expected)
            first += -(-len(rows) // block_size)


def test_a_selection_depends_on_no_cut(monkeypatch):
    """Not on which rows are asked for, what is packed beside them, how many scores are held, or later tokens."""
    lengths, sizes = (40, 150, 9), (16, 4)
    q, k, *_ = inputs(lengths, 2, 1, 16)
    whole = select(q, k, lengths, *sizes)
    monkeypatch.setattr(triton_score, "_SCORES", 5 * 16 * 16)
    monkeypatch.setattr(triton_score, "_SCORES_EACH", 0)
    for first, end in ((0, 117), (117, 199)):
        assert torch.equal(select(q[first:end], k, lengths, *sizes, rows=(first, end)), whole[first:end])
    assert torch.equal(select(q[40:190], k[40:190], (150,), *sizes), whole[40:190])
    changed = k.clone()
    changed[169:] += 1
    assert torch.equal(select(q, changed, lengths, *sizes)[40:169], whole[40:169])


def test_of_equal_scores_the_first_blocks_are_taken():
    """One key alone differs, so that its block is better or worse than the others, which are equal."""
    q, k, *_ = inputs((200,), 1, 1, 16)

    def of_the_last():
        return select(q[-1:], k, (200,), 16, 6, rows=(199, 200)).flatten().tolist()

    k[:] = 0
    assert of_the_last() == [0, 1, 2, 3, 11, 12]
    k[2 * 16] = -9 * q[-1]
    assert of_the_last() == [0, 1, 3, 4, 11, 12]
    k[2 * 16] = 0
    k[9 * 16] = 9 * q[-1]
    assert of_the_last() == [0, 1, 2, 9, 11, 12]


def top(scores, num_blocks, block_size=16):
    """The selection of the last token of a document, given its scores of all blocks before the previous one."""
    blocks = len(scores) + 2
    row = SimpleNamespace(tokens=blocks * block_size, size=1)
    sequences = Sequences.of((row.tokens,), DEVICE)
    selection = torch.full((1, 1, num_blocks), -7, dtype=torch.int32, device=DEVICE)
    triton_score.top_kernel[1](
        scores.to(DEVICE), selection, torch.tensor([row.tokens - 1], dtype=torch.int32, device=DEVICE),
        sequences.begins, sequences.ends, 0, 1, row.tokens - 1, row.tokens, 1, len(scores),
        TOKENS=1, BLOCK=block_size, NUM_BLOCKS=num_blocks, FREE=num_blocks - 3, LIST=16, SLOTS=16, ROWS=4, COLUMNS=32,
        num_warps=1,
    )  # fmt: skip
    return selection.flatten().tolist()


@pytest.mark.parametrize("scores", ["random", "tied", "zero", "nan"])
def test_the_best_scores_are_taken_in_the_order_of_blocks(scores):
    values = torch.rand(100, generator=torch.Generator().manual_seed(3))
    if scores == "tied":
        values = (values * 5).floor()
    if scores == "zero":
        values = torch.where(values > 0.97, values, 0)
    if scores == "nan":
        values[::3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    ranks = torch.nan_to_num(values, 9.0)
    best = sorted(sorted(range(1, 100), key=lambda n: (-ranks[n].item(), n))[:11])
    assert top(values, 14) == [0, *best, 100, 101]


def test_joint_blocks_of_a_tile():
    """Of any lists: with holes, with and without blocks in common."""
    lengths, size, num_blocks = (1, 7, 12), 4, 6
    generator = torch.Generator().manual_seed(1)
    selection = torch.full((20, 2, num_blocks), -1, dtype=torch.int32)
    for row in range(20):
        for head in range(2):
            count = int(torch.randint(0, num_blocks + 1, (), generator=generator))
            selection[row, head, :count] = torch.randperm(9, generator=generator)[:count].sort().values
    for rows in ((0, 20), (6, 15)):
        some = selection[slice(*rows)]
        joint = union(some.to(DEVICE), Sequences.of(lengths, DEVICE), size, rows)
        expected = joint_blocks(some, Sequences.of(lengths), size, rows)
        assert torch.equal(joint.counts.cpu(), expected.counts)
        for a, b in zip(joint[:2], expected[:2], strict=True):
            assert torch.equal(torch.where(b >= 0, a.cpu(), -1), b)


@pytest.mark.usefixtures("joined_in_python")
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("scale", interpreted([100.0], [0.0, 100.0]))
def test_equal_keys_and_extreme_logits(scale, block_size):
    tokens = 4 * block_size + 20
    lengths, (q, k, v, gates) = (tokens,), inputs((tokens,), 2, 1, 16)
    q, k = q * scale, k * scale
    o, selection, saved = attend((q, k, v, gates), lengths, block_size, 4, 20)
    assert all(torch.isfinite(x).all() for x in (o, saved.o_selected, saved.lse_selected, saved.lse_window))
    # Where fp32 knows no difference the first are taken. A logit of 30,000 has steps of 2e-3 there, so that of two
    # blocks with one head's whole weight each either may be.
    scores = [
        (current, torch.tensor(heads[0]).float().tolist())
        for current, heads in oracle_scores(q, k, lengths, block_size, range(tokens))
    ]
    close = [scale > 0 and current == 4 and min(each[1:3]) > 0.99 * max(each[1:3]) > 0 for current, each in scores]
    assert sum(close) <= 6
    chosen = [chosen_blocks(each, current, 4) for current, each in scores]
    told_apart = ~torch.tensor(close)
    assert torch.equal(selection[told_apart, 0], torch.tensor(chosen, dtype=torch.int32)[told_apart])
    exact = [x.double() for x in (q, k, v, gates)]
    expected = oracle_attention(*exact, selection, lengths, block_size, 20)
    # Logits of 30,000 have steps of 2e-3 in fp32.
    torch.testing.assert_close(o.double(), expected, rtol=5e-3, atol=5e-3)


def with_gradients(tensors, lengths, sizes, selection=None):
    """The selection; o's gradient; o, and gradients of q, k, v and gates, all on the CPU."""
    leaves = [x.to(DEVICE).requires_grad_() for x in tensors]
    selection = selection if selection is None else selection.to(DEVICE)
    o, used = nsa.native_sparse_attention(*leaves, Sequences.of(lengths, DEVICE), *sizes, selection)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(9))
    return used.cpu(), do, [x.cpu() for x in (o.detach(), *torch.autograd.grad(o, leaves, do.to(DEVICE)))]


def check_gradients(tensors, lengths, sizes, selection, do, found):
    """Of `with_gradients`, o included, against the oracle with this selection."""
    exact = [x.double().requires_grad_() for x in tensors]
    o = oracle_attention(*exact, selection, lengths, sizes[0], sizes[2])
    for a, b in zip(found, (o, *torch.autograd.grad(o, exact, do.double())), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


@pytest.mark.usefixtures("joined_in_python")
@pytest.mark.parametrize("block_size", [32, 64])
def test_larger_blocks(block_size, monkeypatch):
    """Lengths around borders, one token, and equal blocks: selection, output and gradients, and what they depend on."""
    step = Launch(64, 4, 1)
    monkeypatch.setattr(triton_backward, "tuning", lambda *_: triton_backward.Tuning(64, 32, step, step, step, step))
    b = block_size
    lengths, sizes = (1, b - 1, b, b + 1, 4 * b + 9), (b, 4, b // 2 + 3)
    q, k, *_ = tensors = inputs(lengths, 2, 1, 16)
    last = slice(sum(lengths[:-1]), None)
    k[last][b : 3 * b] = k[last][b]  # of equal blocks the first is taken
    selection = oracle_selection(q, k, lengths, *sizes[:2])
    assert selection[-1].tolist() == [[0, 1, 3, 4]]
    chosen, *found = with_gradients(tensors, lengths, sizes)
    assert torch.equal(chosen, selection)
    check_gradients(tensors, lengths, sizes, selection, *found)
    changed = [torch.cat([x[last][: 4 * b], x[last][4 * b :] + 1]) for x in tensors]
    o, chosen, _ = attend(changed, lengths[-1:], *sizes)
    for alone, packed in ((o, found[1][0]), (chosen, selection)):
        assert torch.equal(alone[: 4 * b], packed[last][: 4 * b])


@pytest.mark.usefixtures("joined_in_python")
def test_a_given_selection_is_used():
    """Of fewer blocks than there are, the first one not always among them: output and gradients."""
    lengths, sizes, tensors = (90,), (16, 4, 20), inputs((90,), 2, 1, 16)
    selection = near_selection(90, 1, 16, 4, 2)
    used, *found = with_gradients(tensors, lengths, sizes, selection)
    assert torch.equal(used, selection)
    check_gradients(tensors, lengths, sizes, selection, *found)


@pytest.mark.usefixtures("joined_in_python")
@pytest.mark.parametrize("fault", ["own", "before", "gate"])
def test_gradients_of_what_is_not_allowed_are_nan(fault):
    """Of the query and of keys that it sees; other queries have theirs."""
    lengths, sizes, tensors, t = (50,), (16, 4, 20), inputs((50,), 2, 1, 16), 40
    selection = near_selection(50, 1, 16, 5, 6)
    if fault == "gate":
        tensors[3][t, 1, 1] = -0.1
    else:
        selection[t, 0] = torch.tensor({"own": [0, 1, -1, -1], "before": [0, 2, -1, -1]}[fault])
    *_, (_, dq, dk, dv, _) = with_gradients(tensors, lengths, sizes, selection)
    assert dq[t, 1].isnan().all() and not dq[torch.arange(50) != t].isnan().any()
    assert dk[t].isnan().all() and dv[t].isnan().all()


@pytest.mark.usefixtures("joined_in_python")
def test_rows_change_with_nothing_that_they_do_not_see():
    """Bit for bit: of a packed document's later tokens and of its neighbours."""
    lengths, sizes, tensors = (30, 80), (16, 4, 20), inputs((30, 80), 2, 1, 16)
    o, selection, _ = attend(tensors, lengths, *sizes)
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[:30] = torch.nan
        x[90:] += 1
    other, chosen, _ = attend(changed, lengths, *sizes)
    assert torch.equal(other[30:90], o[30:90]) and torch.equal(chosen[30:90], selection[30:90])


@on_a_gpu
@pytest.mark.parametrize(
    "query_heads, heads, head_dim, block_size", [(32, 2, 64, 64), (16, 2, 128, 32), (4, 1, 256, 16)]
)
def test_bfloat16_at_lengths_around_what_is_all_selected(query_heads, heads, head_dim, block_size):
    """Blocks but for a margin the best ones, rows beside the oracle, repeats; also where all blocks are selected."""
    everything = 16 * block_size
    lengths = (1, block_size - 1, block_size + 1, everything - 1, everything, everything + 1, 3 * everything + 17)
    tensors = inputs(lengths, query_heads, heads, head_dim, torch.bfloat16)
    q, k, v, gates = tensors
    o, selection, _ = attend(tensors, lengths, block_size, 16, 512)
    again, chosen, _ = attend(tensors, lengths, block_size, 16, 512)
    assert torch.equal(o, again) and torch.equal(selection, chosen)
    exact = [x.double() for x in (q, k, v)]
    rows = range(0, sum(lengths), 37)
    assert flipped(selection, q, k, lengths, block_size, rows) <= 1e-2 * heads * len(rows)
    wanted = oracle_attention(*exact, gates.double(), selection, lengths, block_size, 512, rows)
    error = (o[rows.start :: rows.step].double() - wanted).norm() / wanted.norm()
    assert error < 1e-2, error
