"""The backward kernels of native sparse attention alone: what the forward pass saves comes from a float64 oracle."""

import pytest
import torch
from cases import interpreted
from oracles_lte import FLOAT32_TOLERANCE, documents, leaf
from oracles_nsa import joint_blocks

from megahybrid_kernels import Sequences
from megahybrid_kernels.native_sparse_attention import triton_backward, triton_pairs
from megahybrid_kernels.native_sparse_attention.triton import native_sparse_attention
from megahybrid_kernels.native_sparse_attention.triton_backward import Tuning, gradients
from megahybrid_kernels.native_sparse_attention.triton_plan import Saved, Shape
from megahybrid_kernels.tuning import Launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("dq", "dk", "dv", "dgates")
# Several of each in a few hundred tokens.
ITEMS = {"ITEM": 24, "POOLED": 16, "PART": 32, "PARTS": 4}
TRAINING = {name: getattr(triton_pairs, name) for name in ITEMS}, triton_backward.tuning


STEP = Launch(32, 4, 1)
SMALL = Tuning(32, 16, Launch(16, 4, 1), STEP, STEP, STEP)


def cut(monkeypatch, items, tuning):
    for name, size in items.items():
        monkeypatch.setattr(triton_pairs, name, size)
    monkeypatch.setattr(triton_backward, "tuning", tuning)


@pytest.fixture(autouse=True)
def small_tiles_and_items(monkeypatch):
    cut(monkeypatch, ITEMS, lambda *_: SMALL)
    if DEVICE == "cpu":
        # Sorting takes most of the time on Triton's interpreter.
        monkeypatch.setattr(triton_backward, "union", joint_blocks)


def inputs(lengths, query_heads, heads, head_dim, dtype=torch.float32):
    tokens = sum(lengths)
    shapes = {"q": (query_heads, head_dim), "k": (heads, head_dim), "v": (heads, head_dim)}
    pairs = {name: leaf(tokens, *shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    gates = torch.sigmoid(leaf(tokens, query_heads, 3, seed=3)[1].detach()).to(dtype)
    return pairs | {"gates": (gates, gates.double().requires_grad_())}


def random_selection(lengths, heads, block_size, num_blocks, hot=None, avoid=None, seed=8):
    """The forced blocks and random ones; block `hot` wherever it is free, block `avoid` nowhere where it is."""
    generator = torch.Generator().manual_seed(seed)
    selection = torch.full((sum(lengths), heads, num_blocks), -1, dtype=torch.int32)
    for rows in documents(lengths):
        for t in range(rows.stop - rows.start):
            current = t // block_size
            forced = {0, max(0, current - 1), current}
            for h in range(heads):
                order = (1 + torch.randperm(max(0, current - 2), generator=generator)).tolist()
                free = sorted((n for n in order if n != avoid), key=lambda n: n != hot)
                chosen = sorted(forced | set(free[: num_blocks - len(forced)]))
                selection[rows.start + t, h, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return selection


def softmax_branch(q, k, v, visible):
    """q [n, Hq, D]; k, v [m, H, D]; visible [H, n, m] -> output, 0 where nothing is visible, and log2 of the sum."""
    groups = q.shape[1] // k.shape[1]
    k, v, visible = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), visible.repeat_interleave(groups, 0)
    logits = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
    peak = logits.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True).detach() if k.shape[0] else torch.zeros(())
    weights = torch.exp(torch.where(visible, logits - peak, -torch.inf))
    total = weights.sum(-1, keepdim=True)
    o = torch.einsum("hij,jhd->ihd", weights / torch.where(total > 0, total, 1), v)
    lse = ((peak + total.log()) / torch.log(torch.tensor(2.0, dtype=torch.float64)))[..., 0].T
    return o, torch.where(total[..., 0].T > 0, lse, torch.inf)


def oracle(q, k, v, selection, lengths, block_size, window_size, dtype):
    """The three branches' outputs and lse, `[3, tokens, ..]`, and the means of blocks, 0 of incomplete ones; means are
    rounded to `dtype`, without effect on gradients."""
    outputs, lses, means = [], [], []
    for rows in documents(lengths):
        n = rows.stop - rows.start
        queries, keys, values, chosen = (x[rows] for x in (q, k, v, selection))
        t, complete, blocks = torch.arange(n, device=q.device), n // block_size, -(-n // block_size)
        pooled = [x[: complete * block_size].unflatten(0, (complete, block_size)).mean(1) for x in (keys, values)]
        pooled = [x + (x.to(dtype).double() - x).detach() for x in pooled]
        member = (chosen[..., None] == torch.arange(blocks, device=q.device)).any(2).transpose(0, 1)
        causal, complete_before = t <= t[:, None], t[:complete] < ((t + 1) // block_size)[:, None]
        results = [
            softmax_branch(queries, *pooled, complete_before.expand(k.shape[1], -1, -1)),
            softmax_branch(queries, keys, values, member[:, :, t // block_size] & causal),
            softmax_branch(queries, keys, values, (causal & (t > t[:, None] - window_size)).expand(k.shape[1], -1, -1)),
        ]
        outputs.append(torch.stack([o for o, _ in results]))
        lses.append(torch.stack([lse for _, lse in results]))
        means.append([torch.cat([x, x.new_zeros(blocks - complete, *x.shape[1:])]) for x in pooled])
    pooled_k, pooled_v = (torch.cat(x) for x in zip(*means, strict=True))
    return torch.cat(outputs, 1), torch.cat(lses, 1), pooled_k, pooled_v


def upstream(pairs):
    return leaf(*pairs["q"][0].shape, seed=5, dtype=pairs["q"][0].dtype)[1].detach()


def ours(pairs, selection, lengths, block_size, window_size, do):
    """dq, dk, dv and dgates."""
    q, k, v, gates = (pair[0].detach().to(DEVICE) for pair in pairs.values())
    exact, selection = [pairs[name][1].detach().to(DEVICE) for name in "qkv"], selection.to(DEVICE)
    outputs, lse, pooled_k, pooled_v = oracle(*exact, selection, lengths, block_size, window_size, q.dtype)
    saved = Saved(
        q, k, v, gates, pooled_k.to(q.dtype), pooled_v.to(q.dtype), selection,
        *(x.contiguous().to(q.dtype) for x in outputs), *(x.contiguous().float() for x in lse),
    )  # fmt: skip
    shape = Shape.of(q, k, block_size, selection.shape[2])
    return [
        x.cpu() for x in gradients(shape, saved, do.to(DEVICE, q.dtype), Sequences.of(lengths, DEVICE), window_size)
    ]


def theirs(pairs, selection, lengths, block_size, window_size, do):
    q, k, v, gates = (pair[1].detach().to(DEVICE).requires_grad_() for pair in pairs.values())
    dtype = pairs["q"][0].dtype
    outputs, *_ = oracle(q, k, v, selection.to(DEVICE), lengths, block_size, window_size, dtype)
    o = sum(gate[..., None] * branch for gate, branch in zip(gates.unbind(-1), outputs, strict=True))
    return [x.cpu() for x in torch.autograd.grad(o, (q, k, v, gates), do.to(DEVICE))]


def check(pairs, selection, lengths, block_size, window_size, tolerance=FLOAT32_TOLERANCE):
    do = upstream(pairs)
    actual = ours(pairs, selection, lengths, block_size, window_size, do)
    expected = theirs(pairs, selection, lengths, block_size, window_size, do)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(
            a.double() / scale, b / scale, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


SIZES = [  # lengths, block size, blocks, window
    ((1,), 16, 3, 5),
    ((3, 1, 70, 33), 16, 4, 20),
    ((290,), 16, 5, 47),
    ((150,), 16, 5, 16),
    ((5, 140), 32, 3, 1),
    ((200,), 64, 3, 500),
]


@pytest.mark.parametrize("lengths, block_size, num_blocks, window_size", interpreted(SIZES[:3], SIZES))
def test_gradients(lengths, block_size, num_blocks, window_size):
    pairs = inputs(lengths, 2, 1, 16)
    check(pairs, random_selection(lengths, 1, block_size, num_blocks), lengths, block_size, window_size)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("one", range(3))
def test_one_gate_alone(one):
    lengths = (70,)
    pairs = inputs(lengths, 2, 1, 16)
    gates = torch.eye(3)[one].expand(70, 2, 3)
    pairs["gates"] = (gates.contiguous(), gates.double().requires_grad_())
    check(pairs, random_selection(lengths, 1, 16, 4), lengths, 16, 20)


@pytest.mark.parametrize("hot, avoid", [(1, 2), (None, 1)])
def test_a_block_that_all_choose_and_one_that_nobody_does(hot, avoid):
    lengths = (84, 20)
    pairs = inputs(lengths, 2, 1, 16)
    check(pairs, random_selection(lengths, 1, 16, 3 + (hot is not None), hot, avoid), lengths, 16, 20)


def test_items_have_room_for_the_pairs_of_whatever_selection(monkeypatch):
    """Whatever a list lacks, no program may read another's sums."""
    monkeypatch.setattr(triton_pairs, "ITEM", 3)
    lengths, num_blocks = (100, 16, 33, 1), 4
    for selection in (
        random_selection(lengths, 2, 16, num_blocks),
        torch.arange(num_blocks, dtype=torch.int32).repeat(sum(lengths), 2, 1),  # all far in a long document
    ):
        pairs = triton_pairs.far_pairs(selection.to(DEVICE), Sequences.of(lengths, DEVICE), 16)
        assert (pairs.item_first[:, -1] <= pairs.item_block.shape[1]).all()


def test_layers_share_what_follows_from_sequences_alone():
    lengths = (84, 33)
    shared = Sequences.of(lengths, DEVICE)
    assert shared.once(triton_pairs.pooled_items, 16) is shared.once(triton_pairs.pooled_items, 16)
    for num_blocks, seed in ((4, 1), (4, 2), (3, 3)):
        selection = random_selection(lengths, 2, 16, num_blocks, seed=seed).to(DEVICE)
        found = triton_pairs.far_pairs(selection, shared, 16)
        for a, b in zip(found, triton_pairs.far_pairs(selection, Sequences.of(lengths, DEVICE), 16), strict=True):
            assert torch.equal(a, b)


def test_lengths_around_borders_of_blocks():
    lengths = (*range(1, 5), 15, 16, 17, 31, 32, 33, 47, 48, 49)
    check(inputs(lengths, 1, 1, 16), random_selection(lengths, 1, 16, 3), lengths, 16, 16)


@pytest.mark.parametrize(
    "query_heads, heads, head_dim", interpreted([(6, 2, 24)], [(6, 2, 24), (16, 1, 16), (5, 1, 40), (1, 1, 16)])
)
def test_grouped_heads_and_odd_head_dims(query_heads, heads, head_dim):
    lengths = (60, 23)
    check(inputs(lengths, query_heads, heads, head_dim), random_selection(lengths, heads, 16, 3), lengths, 16, 11)


def test_half_precision_with_the_tiles_of_training(monkeypatch):
    cut(monkeypatch, *TRAINING)
    lengths = (200, 33)
    pairs = inputs(lengths, 4, 1, 32, torch.float16)
    check(pairs, random_selection(lengths, 1, 32, 4), lengths, 32, 50, tolerance=3e-3)


def test_packed_equals_separate_again_and_strided():
    lengths, sizes = (50, 1, 33), (16, 20)
    pairs, selection = inputs(lengths, 2, 1, 16), random_selection(lengths, 1, 16, 4)
    do = upstream(pairs)
    whole = ours(pairs, selection, lengths, *sizes, do)
    fused = torch.cat([pairs[name][0].detach() for name in "qkv"], 1)
    strided = dict(zip("qkv", fused.split([2, 1, 1], 1), strict=True)) | {"gates": pairs["gates"][0]}
    strided = {name: (x, pairs[name][1]) for name, x in strided.items()}
    for name, a, b in zip(NAMES, whole, ours(strided, selection, lengths, *sizes, do), strict=True):
        assert torch.equal(a, b), name
    for rows in documents(lengths):
        part = {name: (pair[0].detach()[rows], pair[1].detach()[rows]) for name, pair in pairs.items()}
        alone = ours(part, selection[rows], (rows.stop - rows.start,), *sizes, do[rows])
        for name, a, b in zip(NAMES, whole, alone, strict=True):
            assert torch.equal(a[rows], b), name


def test_joined_with_the_forward_pass():
    lengths, block_size, num_blocks, window_size = (70, 20), 16, 4, 20
    pairs = inputs(lengths, 2, 1, 16)
    leaves = [pair[0].detach().to(DEVICE).requires_grad_() for pair in pairs.values()]
    o, selection = native_sparse_attention(*leaves, Sequences.of(lengths, DEVICE), block_size, num_blocks, window_size)
    do = upstream(pairs)
    actual = torch.autograd.grad(o, leaves, do.to(DEVICE, o.dtype))
    expected = theirs(pairs, selection.cpu(), lengths, block_size, window_size, do)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(
            a.cpu().double(), b, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


FULL = [  # lengths, query heads, heads, head dim, block size, blocks, window
    ((1500,), 16, 1, 64, 64, 8, 512),
    ((700, 1, 33, 2, 801, 64, 128), 32, 2, 64, 64, 6, 512),
    ((1100, 300), 16, 2, 128, 64, 8, 300),
    ((900, 301), 16, 1, 256, 32, 6, 100),
    ((900, 301), 6, 2, 64, 16, 8, 100),
    ((700, 301), 3, 1, 96, 32, 4, 40),
    ((1300,), 1, 1, 64, 64, 8, 200),
]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_full_sizes_on_a_gpu(case, dtype, tolerance, monkeypatch):
    """Against float64 by relative norm, in the tiles and items of training, and twice the same bits."""
    cut(monkeypatch, *TRAINING)
    lengths, query_heads, heads, head_dim, block_size, num_blocks, window_size = case
    pairs = inputs(lengths, query_heads, heads, head_dim, dtype)
    selection, do = random_selection(lengths, heads, block_size, num_blocks, hot=3), upstream(pairs)
    first, second = (ours(pairs, selection, lengths, block_size, window_size, do) for _ in range(2))
    expected = theirs(pairs, selection, lengths, block_size, window_size, do)
    for name, a, b, truth in zip(NAMES, first, second, expected, strict=True):
        assert torch.equal(a, b), name
        assert ((a.double() - truth).norm() / truth.norm()).item() <= tolerance, name
