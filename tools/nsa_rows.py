"""What `bench_nsa` measures and how it is judged: rows of inputs, and the op in float64 for some of their queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_common import DEVICE, errors, gradients
from torch import Tensor

from megahybrid.devices import peak_flops
from megahybrid_kernels import Sequences
from megahybrid_kernels.native_sparse_attention.limits import FORCED_BLOCKS
from megahybrid_kernels.native_sparse_attention.pooling import pool
from megahybrid_kernels.native_sparse_attention.triton_union import union

# Of scores, how much less than the least of the best is the same; and of outputs and gradients, by norm.
MARGIN, TOLERANCE = 1e-3, 1e-2
NAMES = ("o", "dq", "dk", "dv", "dgates")


@dataclass(frozen=True)
class Sizes:
    """Those of the published layer, or toys; half precision is what Triton's interpreter multiplies."""

    query_heads: int = 32
    heads: int = 2
    head_dim: int = 64
    block: int = 64
    blocks: int = 16
    window: int = 512
    judged: int = 256
    dtype: torch.dtype = torch.bfloat16

    @property
    def limits(self) -> tuple[int, int, int]:
        """As the op takes them."""
        return self.block, self.blocks, self.window


PUBLISHED = Sizes()
TINY = Sizes(query_heads=4, heads=2, head_dim=16, block=16, blocks=4, window=20, judged=8, dtype=torch.float16)

# How keys and queries are made, and what that models.
KEYS = {
    "near": "queries that turn slowly, keys alike within a block: 4 neighbours select some 22 blocks together, as was "
    "published of trained models",
    "random": "nothing in common between neighbours, the most blocks together",
    "hot": "near, and one block that all queries select: its gradient has the most to add up",
    "given": "a layer of a trained model on held-out text",
}
# Tokens in which a query turns to the next direction.
_TURN = 32


@dataclass(frozen=True)
class Row:
    """`count` documents of `length` tokens; `keys` one of KEYS, or `given` q, k, v and gates, named by `source`."""

    length: int
    count: int
    keys: str
    sizes: Sizes = PUBLISHED
    given: dict[str, Tensor] | None = None
    source: str = ""

    @property
    def name(self) -> str:
        """For the reader."""
        return f"{self.count} x {self.length}, {self.keys}" + f" {self.source}" * bool(self.source)

    @property
    def tokens(self) -> int:
        return self.length * self.count

    @property
    def sequences(self) -> Sequences:
        return Sequences.of((self.length,) * self.count, DEVICE)

    def inputs(self) -> dict[str, Tensor]:
        """q, k, v and gates."""
        if self.given is not None:
            return {name: self.given[name].to(DEVICE, self.sizes.dtype) for name in ("q", "k", "v", "gates")}
        sizes = self.sizes
        q, k, v = (
            torch.randn(self.tokens, heads, sizes.head_dim, device=DEVICE)
            for heads in (sizes.query_heads, sizes.heads, sizes.heads)
        )
        if self.keys != "random":
            q = q / 4 + 2 * turning(self.tokens, sizes.query_heads, sizes.head_dim)
            blocks = torch.randn(self.tokens // sizes.block + 1, *k.shape[1:], device=DEVICE)
            k += 2 * blocks.repeat_interleave(sizes.block, 0)[: self.tokens]
        if self.keys == "hot":
            q += 1
            k.view(self.count, self.length, *k.shape[1:])[:, sizes.block : 2 * sizes.block] += 1
        gates = torch.randn(self.tokens, sizes.query_heads, 3, device=DEVICE).sigmoid()
        return {name: x.to(sizes.dtype) for name, x in (("q", q), ("k", k), ("v", v), ("gates", gates))}

    def floors(self) -> dict[str, float] | None:
        """Milliseconds of the products at the card's peak: forward, and with backward."""
        if not peak_flops():
            return None
        sizes, t = self.sizes, torch.arange(self.length, dtype=torch.float64)
        most = (sizes.blocks - 1) * sizes.block + t % sizes.block + 1
        selected = torch.where(t // sizes.block < sizes.blocks, t + 1, most)
        keys = selected + (t + 1) // sizes.block + (t + 1).clamp(max=sizes.window)
        each = 2e3 * keys.sum().item() * self.count * sizes.query_heads * sizes.head_dim / peak_flops()
        return {"forward": round(2 * each, 4), "both": round(7 * each, 4)}


def turning(tokens: int, heads: int, head_dim: int) -> Tensor:
    """Random directions that turn, each into the next, within _TURN tokens."""
    t = torch.arange(tokens, device=DEVICE)
    ends = torch.randn(tokens // _TURN + 2, heads, head_dim, device=DEVICE)
    angle = (t % _TURN / _TURN * math.pi / 2)[:, None, None]
    return ends[t // _TURN] * angle.cos() + ends[t // _TURN + 1] * angle.sin()


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [H, G, D], k and v [H, n, D], visible [H, n]; 0 where nothing is."""
    logits = torch.einsum("hgd,hnd->hgn", q, k) * q.shape[2] ** -0.5
    p = logits.masked_fill(~visible[:, None], -1e30).softmax(-1) * visible[:, None]
    return torch.einsum("hgn,hnd->hgd", p, v)


def means(x: Tensor, rounded: Tensor, block: int) -> Tensor:
    """Of complete blocks of one document, with the bits of the kernels' and the gradients of the exact ones."""
    blocks = x[: len(x) // block * block].unflatten(0, (-1, block)).mean(1)
    return blocks + (pool(rounded[: len(blocks) * block].unflatten(0, (-1, block))).double() - blocks).detach()


def exact(row: Row, inputs: dict[str, Tensor], selection: Tensor, places: list[int]) -> Callable[..., Tensor]:
    """The op for the tokens `places` alone under a selection, of q, k, v and gates in float64."""
    length, heads, (block, _, window_size) = row.length, row.sizes.heads, row.sizes.limits

    def op(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        outputs, pooled = [], {}
        lane, head = torch.arange(block, device=q.device), torch.arange(heads, device=q.device)[:, None]
        for place in places:
            begin, t = place // length * length, place % length
            if begin not in pooled:
                part = slice(begin, begin + length)
                parts = (means(x[part], inputs[n][part], block).transpose(0, 1) for n, x in (("k", k), ("v", v)))
                pooled = {begin: list(parts)}
            query = q[place].unflatten(0, (heads, -1))
            seen = torch.arange(pooled[begin][0].shape[1], device=q.device) < (t + 1) // block
            o = [attend(query, *pooled[begin], seen.expand(heads, -1))]
            j = (selection[place].long()[..., None] * block + lane).flatten(1)
            key = begin + j.clamp(0, length - 1)
            o.append(attend(query, k[key, head], v[key, head], (j >= 0) & (j <= t)))
            near = slice(max(begin, place - window_size + 1), place + 1)
            window = [x[near].transpose(0, 1) for x in (k, v)]
            o.append(attend(query, *window, torch.ones_like(window[0][..., 0], dtype=torch.bool)))
            outputs.append(sum(gates[place, :, n, None] * x.flatten(0, 1) for n, x in enumerate(o)))
        return torch.stack(outputs)

    return op


def flips(row: Row, inputs: dict[str, Tensor], selection: Tensor, places: list[int]) -> float:
    """Share of the tokens `places` and heads that select others than the best blocks in float64.

    Raises ValueError when one of these has a score beyond the margin, or a forced block is missing.
    """
    different, heads, (block, blocks, _) = 0, row.sizes.heads, row.sizes.limits
    for place in places:
        begin, t = place // row.length * row.length, place % row.length
        current, ours = t // block, selection[place].long()
        if current < blocks:
            expected = torch.tensor([*range(current + 1), *[-1] * (blocks - current - 1)], device=ours.device)
            if not (ours == expected).all():
                raise ValueError(f"token {place} selects {ours.tolist()}, not all of its blocks")
            continue
        complete = slice(begin, begin + (t + 1) // block * block)
        mean = pool(inputs["k"][complete].unflatten(0, (-1, block))).double()
        query = inputs["q"][place].double().unflatten(0, (heads, -1))
        score = torch.einsum("hgd,nhd->hgn", query, mean) * query.shape[2] ** -0.5
        score = score.softmax(-1).sum(1)[:, : current - 1]
        best = score[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, : blocks - FORCED_BLOCKS]
        best, forced = best.sort(1).values + 1, ours[:, [0, -2, -1]].tolist()
        if forced != [[0, current - 1, current]] * heads:
            raise ValueError(f"token {place} selects {ours.tolist()}, without a forced block")
        ours, least = ours[:, 1:-2], score.gather(1, best).amin(1, keepdim=True)
        if (score.gather(1, ours) < (1 - MARGIN) * least).any():
            raise ValueError(f"token {place} selects {ours.tolist()}, not {best.tolist()}")
        different += (ours != best).any(1).sum().item()
    return different / len(places) / heads


def judge(row: Row, op: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor]) -> dict[str, object]:
    """Errors of `op` of q, k, v and gates, which also gives the selection, in float64, and what it selected.

    Only some queries have a cotangent, so that the exact dk and dv are sums over those alone, at any length. Exits or
    raises ValueError where something is wrong.
    """
    places = torch.randperm(row.tokens, generator=torch.Generator().manual_seed(1))[: row.sizes.judged - 2].tolist()
    places = sorted({0, row.tokens - 1, *places})
    cotangent = torch.zeros_like(inputs["q"])
    cotangent[places] = torch.randn_like(cotangent[places])
    with torch.no_grad():
        _, selection = op(*inputs.values())
    found = list(gradients(lambda *x: op(*x)[0], inputs, cotangent))
    double = {name: x.double() for name, x in inputs.items()}
    expected = gradients(exact(row, inputs, selection, places), double, cotangent[places])
    found[0] = found[0][places]
    wrong = errors(tuple(found), expected, TOLERANCE)
    joint = {size: union(selection, row.sequences, size).counts.double().mean().item() for size in (2, 4, 8)}
    return {
        "errors": dict(zip(NAMES, wrong, strict=True)),
        "flipped": flips(row, inputs, selection, places),
        "joint": {size: round(count, 1) for size, count in joint.items()},
    }
