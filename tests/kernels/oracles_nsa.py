"""Native sparse attention in float64, token by token and block by block."""

from __future__ import annotations

import torch
from oracles_lte import documents
from torch import Tensor


def block_means(x: Tensor, block_size: int) -> list[Tensor]:
    """x [n, H, D] of one document -> [H, D] of each complete block, rounded as x is."""
    ends = range(block_size, len(x) + 1, block_size)
    return [
        x[end - block_size : end].to(torch.promote_types(x.dtype, torch.float32)).mean(0).to(x.dtype) for end in ends
    ]


def softmax_attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """q [G, D] of one KV head; keys, values: [D] each."""
    if not keys:
        return torch.zeros_like(q)
    logits = q @ torch.stack(keys).T / q.shape[1] ** 0.5
    weights = torch.exp(logits - logits.max(1, keepdim=True).values.detach())
    return weights @ torch.stack(values) / weights.sum(1, keepdim=True)


def block_scores(q: Tensor, means: list[Tensor]) -> list[float]:
    """q [G, D] and the means [D] that it sees of one KV head."""
    if not means:
        return []
    return torch.softmax(q @ torch.stack(means).T / q.shape[1] ** 0.5, 1).sum(0).tolist()


def chosen_blocks(scores: list[float], current: int, num_blocks: int) -> list[int]:
    forced = {0, max(0, current - 1), current}
    free = sorted(set(range(current)) - forced, key=lambda n: (-scores[n], n))
    chosen = sorted(forced | set(free[: num_blocks - len(forced)]))
    return chosen + [-1] * (num_blocks - len(chosen))


def oracle_selection(q: Tensor, k: Tensor, lengths: tuple[int, ...], block_size: int, num_blocks: int) -> Tensor:
    """The means have k's precision, all else is float64."""
    groups = q.shape[1] // k.shape[1]
    selection = torch.empty(*k.shape[:2], num_blocks, dtype=torch.int32)
    for rows in documents(lengths):
        means = [mean.double() for mean in block_means(k[rows], block_size)]
        for t in range(rows.stop - rows.start):
            for h in range(k.shape[1]):
                heads = q[rows.start + t, h * groups : (h + 1) * groups].double()
                scores = block_scores(heads, [mean[h] for mean in means[: (t + 1) // block_size]])
                selection[rows.start + t, h] = torch.tensor(chosen_blocks(scores, t // block_size, num_blocks))
    return selection


def oracle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    selection: Tensor,
    lengths: tuple[int, ...],
    block_size: int,
    window_size: int,
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for rows in documents(lengths):
        queries, keys, values, gate, blocks = (x[rows] for x in (q, k, v, gates, selection.tolist()))
        mean_keys, mean_values = block_means(keys, block_size), block_means(values, block_size)
        for t in range(len(keys)):
            heads = []
            for h in range(k.shape[1]):
                own = slice(h * groups, (h + 1) * groups)
                complete = range((t + 1) // block_size)
                chosen = [
                    j for n in blocks[t][h] if n >= 0 for j in range(n * block_size, (n + 1) * block_size) if j <= t
                ]
                window = range(max(0, t - window_size + 1), t + 1)
                compressed = softmax_attention(
                    queries[t, own], [mean_keys[n][h] for n in complete], [mean_values[n][h] for n in complete]
                )
                selected, near = (
                    softmax_attention(queries[t, own], [keys[j, h] for j in seen], [values[j, h] for j in seen])
                    for seen in (chosen, window)
                )
                g = gate[t, own, :, None]
                heads.append(g[:, 0] * compressed + g[:, 1] * selected + g[:, 2] * near)
            outputs.append(torch.cat(heads))
    return torch.stack(outputs)
