"""Native sparse attention in float64, token by token and block by block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from oracles_lte import documents
from torch import Tensor

from megahybrid_kernels import Sequences
from megahybrid_kernels.native_sparse_attention.triton_plan import tiles_of
from megahybrid_kernels.native_sparse_attention.triton_union import Union


def block_means(x: Tensor, block_size: int) -> Tensor:
    """x [n, H, D] of one document -> [blocks, H, D] of its complete blocks, rounded as x is."""
    exact = x.double()
    means = [exact[end - block_size : end].mean(0) for end in range(block_size, len(x) + 1, block_size)]
    return torch.stack(means).to(x.dtype).double() if means else exact[:0]


def softmax_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [G, D] of one KV head; keys, values [n, D]."""
    if len(keys) == 0:
        return torch.zeros_like(q)
    logits = q @ keys.T / q.shape[1] ** 0.5
    weights = torch.exp(logits - logits.max(1, keepdim=True).values.detach())
    return weights @ values / weights.sum(1, keepdim=True)


def block_scores(q: Tensor, means: Tensor) -> list[float]:
    """q [G, D] and the means [n, D] that it sees of one KV head."""
    return torch.softmax(q @ means.T / q.shape[1] ** 0.5, 1).sum(0).tolist()


def chosen_blocks(scores: list[float], current: int, num_blocks: int) -> list[int]:
    forced = {0, max(0, current - 1), current}
    free = sorted(set(range(current)) - forced, key=lambda n: (-scores[n], n))
    chosen = sorted(forced | set(free[: num_blocks - len(forced)]))
    return chosen + [-1] * (num_blocks - len(chosen))


def oracle_scores(
    q: Tensor, k: Tensor, lengths: tuple[int, ...], block_size: int, tokens: Sequence[int]
) -> list[tuple[int, list[list[float]]]]:
    """Of each token its own block, and for each KV head the scores of all complete blocks up to it. The means have k's
    precision."""
    groups = q.shape[1] // k.shape[1]
    found = {}
    for rows in documents(lengths):
        means = block_means(k[rows], block_size)
        for row in set(range(rows.start, rows.stop)) & set(tokens):
            t, heads = row - rows.start, q[row].double().unflatten(0, (-1, groups))
            seen = means[: (t + 1) // block_size]
            found[row] = (t // block_size, [block_scores(each, seen[:, h]) for h, each in enumerate(heads)])
    return [found[row] for row in tokens]


def oracle_selection(
    q: Tensor,
    k: Tensor,
    lengths: tuple[int, ...],
    block_size: int,
    num_blocks: int,
    tokens: Sequence[int] | None = None,
) -> Tensor:
    """Of all tokens, or of `tokens` alone."""
    scores = oracle_scores(q, k, lengths, block_size, range(len(q)) if tokens is None else tokens)
    chosen = [[chosen_blocks(each, current, num_blocks) for each in heads] for current, heads in scores]
    return torch.tensor(chosen, dtype=torch.int32)


def near_selection(tokens: int, heads: int, block_size: int, *others: int) -> Tensor:
    """int32 `[tokens, heads, 2 + others]` of one document: each query's own block, the one before, and those `others`
    before, in descending order; block 0 is not always among them."""
    lists = []
    for current in (t // block_size for t in range(tokens)):
        chosen = [current - n for n in (*others, 1, 0) if n <= current]
        lists.append(chosen + [-1] * (len(others) + 2 - len(chosen)))
    return torch.tensor(lists, dtype=torch.int32)[:, None].repeat(1, heads, 1)


def joint_blocks(selection: Tensor, sequences: Sequences, size: int, rows: tuple[int, int] | None = None) -> Union:
    """Of the tiles that hold `rows`, all without, as `triton_union.union` gives it; selection is that of these rows."""
    begin, end = rows or (0, sequences.tokens)
    tiles, first, count = tiles_of(sequences, size, (begin, end))
    lists, (_, heads, num_blocks) = selection.tolist(), selection.shape
    blocks, members = selection.new_full((2, count, heads, size * num_blocks), -1)
    counts = selection.new_zeros(count, heads)
    for tile, i0 in enumerate(tiles.firsts[first : first + count].tolist()):
        tokens = range(max(i0, begin), min(i0 + size, end, int(sequences.ends[i0])))
        for h in range(heads):
            listed: dict[int, int] = {}
            for token in tokens:
                for n in lists[token - begin][h]:
                    listed[n] = listed.get(n, 0) | 1 << token - i0
            found = sorted(item for item in listed.items() if item[0] >= 0)
            blocks[tile, h, : len(found)], members[tile, h, : len(found)] = selection.new_tensor(found).reshape(-1, 2).T
            counts[tile, h] = len(found)
    return Union(blocks, members, counts)


def flipped(
    selection: Tensor, q: Tensor, k: Tensor, lengths: tuple[int, ...], block_size: int, tokens: Sequence[int]
) -> int:
    """How many of the lists of `tokens` take a block that is worse than one left out. Asserts that it is less than 1e-6
    worse, and that the form is canonical and the forced blocks are there."""
    count = 0
    for row, (current, heads) in zip(tokens, oracle_scores(q, k, lengths, block_size, tokens), strict=True):
        for listed, scores in zip(selection[row].tolist(), heads, strict=True):
            chosen = [n for n in listed if n >= 0]
            assert len(chosen) == min(len(listed), current + 1) and all(a < b for a, b in pairwise(chosen))
            assert {0, max(0, current - 1), current} <= set(chosen) and chosen[-1] == current
            free = [scores[n] for n in chosen if 0 < n < current - 1]
            others = [scores[n] for n in set(range(1, current - 1)) - set(chosen)]
            if free and others:
                assert min(free) >= max(others) - 1e-6
                count += min(free) < max(others)
    return count


def oracle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    selection: Tensor,
    lengths: tuple[int, ...],
    block_size: int,
    window_size: int,
    tokens: Sequence[int] | None = None,
) -> Tensor:
    """Of all tokens, or of `tokens` alone."""
    groups = q.shape[1] // k.shape[1]
    tokens = range(len(q)) if tokens is None else tokens
    outputs = {}
    for rows in documents(lengths):
        keys, values = k[rows], v[rows]
        mean_keys, mean_values = block_means(keys, block_size), block_means(values, block_size)
        for row in set(range(rows.start, rows.stop)) & set(tokens):
            t, heads = row - rows.start, []
            for h in range(k.shape[1]):
                query, g = (x[row, h * groups : (h + 1) * groups] for x in (q, gates))
                complete = (t + 1) // block_size
                compressed = softmax_attention(query, mean_keys[:complete, h], mean_values[:complete, h])
                blocks = [n for n in selection[row, h].tolist() if n >= 0]
                chosen = [j for n in blocks for j in range(n * block_size, (n + 1) * block_size) if j <= t]
                selected = softmax_attention(query, keys[chosen, h], values[chosen, h])
                near = slice(max(0, t - window_size + 1), t + 1)
                window = softmax_attention(query, keys[near, h], values[near, h])
                heads.append(g[:, :1] * compressed + g[:, 1:2] * selected + g[:, 2:] * window)
            outputs[row] = torch.cat(heads)
    return torch.stack([outputs[row] for row in tokens])
