"""The backward kernels of native sparse attention alone: what the forward pass saves comes from a float64 oracle."""

import pytest
import torch
from oracles_lte import FLOAT32_TOLERANCE, documents, leaf

from megahybrid_kernels import Sequences
from megahybrid_kernels.native_sparse_attention import triton_pairs
from megahybrid_kernels.native_sparse_attention.triton_backward import gradients
from megahybrid_kernels.native_sparse_attention.triton_plan import Saved, Shape

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_items(monkeypatch):
    """Several of each in a few hundred tokens."""
    for name, size in {"ITEM": 24, "POOLED": 16, "PART": 32, "PARTS": 4}.items():
        monkeypatch.setattr(triton_pairs, name, size)


def inputs(lengths, query_heads, heads, head_dim, dtype=torch.float32):
    tokens = sum(lengths)
    shapes = {"q": (query_heads, head_dim), "k": (heads, head_dim), "v": (heads, head_dim)}
    pairs = {name: leaf(tokens, *shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    gates = torch.sigmoid(leaf(tokens, query_heads, 3, seed=3)[1].detach()).to(dtype)
    return pairs | {"gates": (gates, gates.double().requires_grad_())}


def random_selection(lengths, heads, block_size, num_blocks, hot=None, avoid=None):
    """The forced blocks and random ones; block `hot` wherever it is free, block `avoid` nowhere where it is."""
    generator = torch.Generator().manual_seed(8)
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
    """q [n, Hq, D]; k, v [m, H, D]; visible [H, n, m] -> the output, 0 where nothing is visible, and log2 of the sum."""
    groups = q.shape[1] // k.shape[1]
    k, v, visible = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), visible.repeat_interleave(groups, 0)
    logits = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
    peak = logits.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True).detach() if k.shape[0] else torch.zeros(())
    weights = torch.exp(torch.where(visible, logits - peak, -torch.inf))
    total = weights.sum(-1, keepdim=True)
    o = torch.einsum("hij,jhd->ihd", weights / torch.where(total > 0, total, 1), v)
    lse = ((peak + total.log()) / torch.log(torch.tensor(2.0, dtype=torch.float64)))[..., 0].T
    return o, torch.where(total[..., 0].T > 0, lse, torch.inf)


def oracle(q, k, v, selection, lengths, block_size, window_size):
    """The three branches' outputs and lse, `[3, tokens, ..]`, and the means of each block, 0 of incomplete ones."""
    outputs, lses, means = [], [], []
    for rows in documents(lengths):
        n = rows.stop - rows.start
        queries, keys, values, chosen = (x[rows] for x in (q, k, v, selection))
        t, complete, blocks = torch.arange(n), n // block_size, -(-n // block_size)
        pooled = [x[: complete * block_size].unflatten(0, (complete, block_size)).mean(1) for x in (keys, values)]
        member = (chosen[..., None] == torch.arange(blocks)).any(2).transpose(0, 1)
        causal = t <= t[:, None]
        results = [
            softmax_branch(
                queries, *pooled, (torch.arange(complete) < ((t + 1) // block_size)[:, None]).expand(k.shape[1], -1, -1)
            ),
            softmax_branch(queries, keys, values, member[:, :, t // block_size] & causal),
            softmax_branch(
                queries, keys, values, (causal & (t > t[:, None] - window_size)).expand(k.shape[1], -1, -1)
            ),
        ]
        outputs.append(torch.stack([o for o, _ in results]))
        lses.append(torch.stack([lse for _, lse in results]))
        means.append([torch.cat([x, x.new_zeros(blocks - complete, *x.shape[1:])]) for x in pooled])
    pooled_k, pooled_v = (torch.cat(x) for x in zip(*means, strict=True))
    return torch.cat(outputs, 1), torch.cat(lses, 1), pooled_k, pooled_v


def ours(pairs, selection, lengths, block_size, window_size, do):
    """dq, dk, dv and dgates."""
    q, k, v, gates = (pair[0].detach().to(DEVICE) for pair in pairs.values())
    exact = (pair[1].detach() for pair in list(pairs.values())[:3])
    outputs, lse, pooled_k, pooled_v = oracle(*exact, selection, lengths, block_size, window_size)
    saved = Saved(
        q, k, v, gates, *(x.to(DEVICE, q.dtype) for x in (pooled_k, pooled_v)), selection.to(DEVICE),
        *(x.contiguous().to(DEVICE, q.dtype) for x in outputs), *(x.contiguous().to(DEVICE, torch.float32) for x in lse),
    )  # fmt: skip
    shape = Shape.of(q, k, block_size, selection.shape[2])
    return [x.cpu() for x in gradients(shape, saved, do.to(DEVICE, q.dtype), Sequences.of(lengths, DEVICE), window_size)]


def theirs(pairs, selection, lengths, block_size, window_size, do):
    q, k, v, gates = (pair[1] for pair in pairs.values())
    outputs, *_ = oracle(q, k, v, selection, lengths, block_size, window_size)
    o = sum(gate[..., None] * branch for gate, branch in zip(gates.unbind(-1), outputs, strict=True))
    return torch.autograd.grad(o, (q, k, v, gates), do)


def check(pairs, selection, lengths, block_size, window_size, tolerance=FLOAT32_TOLERANCE):
    do = leaf(*pairs["q"][0].shape, seed=5, dtype=pairs["q"][0].dtype)[1].detach()
    actual = ours(pairs, selection, lengths, block_size, window_size, do)
    expected = theirs(pairs, selection, lengths, block_size, window_size, do)
    for name, a, b in zip(("dq", "dk", "dv", "dgates"), actual, expected, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(
            a.double() / scale, b / scale, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    return actual


@pytest.mark.parametrize(
    "lengths, block_size, num_blocks, window_size",
    [((1,), 16, 3, 5), ((3, 1, 70, 33), 16, 4, 20), ((290,), 16, 5, 40), ((5, 140), 32, 3, 1), ((200,), 64, 3, 500)],
)
def test_gradients(lengths, block_size, num_blocks, window_size):
    pairs = inputs(lengths, 4, 2, 16)
    check(pairs, random_selection(lengths, 2, block_size, num_blocks), lengths, block_size, window_size)
