"""Plain float64 definitions of attention, token eviction and its router, written to be read rather than to be fast."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from megahybrid_kernels import Sequences

FLOAT64_TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 2e-5
BFLOAT16_TOLERANCE = 2e-2


def documents(lengths: tuple[int, ...]) -> list[slice]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, factor: Tensor | None = None) -> Tensor:
    """q [n, Hq, D]; k, v [n, H, D]; visible [H, n, n]; factor [n, H], of weights before they are normalised."""
    groups = q.shape[1] // k.shape[1]
    k, v, visible = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), visible.repeat_interleave(groups, 0)
    logits = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
    weights = torch.exp(logits - logits.amax(-1, keepdim=True)) * visible
    if factor is not None:
        weights = weights * factor.repeat_interleave(groups, 1).T[:, None]
    return torch.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdim=True), v)


def causal_mask(n: int, window_size: int | None = None) -> Tensor:
    return torch.tensor([[j <= i and (window_size is None or i - j < window_size) for j in range(n)] for i in range(n)])


def streaming_buffer(
    score: list[float], window_size: int, sink_size: int, buffer_size: int
) -> tuple[list[list[int]], dict[int, int | None]]:
    """One head, one document, token by token.

    Returns what the buffer holds at every query, until all tokens have left the window, and for each token that ever
    entered the query at which it left (None: never). Tokens that were turned away are not listed.
    """

    def worth(j: int) -> float:
        return float("inf") if j < sink_size else score[j]

    held: list[int] = []
    exits: dict[int, int | None] = {}
    history = []
    for i in range(len(score) + window_size + 1):
        j = i - window_size - 1
        if j >= 0 and worth(j) > 0:
            if len(held) == buffer_size:
                least = min(worth(other) for other in held)
                loser = max(other for other in held if worth(other) == least)
                if worth(j) > least:
                    held.remove(loser)
                    exits[loser] = i
            if len(held) < buffer_size:
                held.append(j)
                exits[j] = None
        history.append(list(held))
    return history, exits


def eviction_mask(score: Tensor, window_size: int, sink_size: int, buffer_size: int | None) -> Tensor:
    """score [n, H] of one document -> visible [H, n, n]."""
    n, heads = score.shape
    visible = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        values = score[:, h].tolist()
        held = streaming_buffer(values, window_size, sink_size, buffer_size or n + 1)[0]
        for i in range(n):
            visible[h, i, max(0, i - window_size) : i + 1] = True
            visible[h, i, held[i]] = True
    return visible


def dense_lte_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    lengths: tuple[int, ...],
    window_size: int,
    sink_size: int,
    buffer_size: int | None,
    gate: str = "value",
) -> Tensor:
    kept = score.detach()
    if gate == "displacing" and buffer_size is not None:
        score = centred(score, lengths, window_size, sink_size, buffer_size)
    one = 1 + score - kept
    gated = v * one[..., None] if gate == "value" else v
    outputs = []
    for rows in documents(lengths):
        visible = eviction_mask(kept[rows], window_size, sink_size, buffer_size)
        factor = None if gate == "value" else one[rows]
        outputs.append(dense_attention(q[rows], k[rows], gated[rows], visible, factor))
        if gate in ("counterfactual", "displacing"):
            outputs[-1] = outputs[-1] + changed_by_the_unseen(q[rows], k[rows], v[rows], one[rows] - 1, visible)
    return torch.cat(outputs)


def centred(score: Tensor, lengths: tuple[int, ...], window_size: int, sink_size: int, buffer_size: int) -> Tensor:
    """score [T, H], the same numbers: as a product with a matrix a document and head that takes away of the mean over
    what the last query no longer sees through the window, and could, but for sinks, the share that has no room."""
    parts, room = [], buffer_size - sink_size
    for rows in documents(lengths):
        part, row = score[rows], torch.arange(rows.stop - rows.start, device=score.device)
        left = (row >= sink_size) & (row < len(row) - 1 - window_size)
        one = ((part.detach() > 0) & left[:, None]).to(score.dtype).T
        rivals = one.sum(1)[:, None, None].clamp(min=1)
        share = (1 - room / rivals).clamp(min=0) / rivals
        centring = torch.eye(len(row), dtype=score.dtype, device=score.device) - share * one[:, :, None] * one[:, None]
        moved = (centring @ part.T[..., None])[..., 0].T
        parts.append(moved + (part - moved).detach())
    return torch.cat(parts)


def changed_by_the_unseen(q: Tensor, k: Tensor, v: Tensor, zero: Tensor, visible: Tensor) -> Tensor:
    """zero [n, H] times, to first order in it, what each output would change by if its query saw one key more, summed
    over the earlier keys that it does not see."""
    q, k, v = (x.detach() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    o = dense_attention(q, k, v, visible)
    changes = torch.zeros_like(q)
    for j in range(len(k)):
        more = visible.clone()
        more[:, j:, j] = True
        change = dense_attention(q, k, v, more) - o
        changes = changes + change * zero[j].repeat_interleave(groups)[:, None]
    return changes


def conv_router(
    k: Tensor, v: Tensor, parameters, lengths, dilation: int, keep=None, probability: float = 0.0
) -> Tensor:
    """keep: for each layer, [T, H * channels_in]."""
    heads = k.shape[1]
    outputs = []
    for rows in documents(lengths):
        x = torch.cat([k[rows], v[rows]], -1).flatten(1).T[None]
        for layer, (weight, bias) in enumerate(zip(parameters.weights, parameters.biases, strict=True)):
            if keep is not None:
                x = x * keep[layer][rows].T / (1 - probability)
            padding = dilation * (weight.shape[2] - 1) // 2
            x = F.silu(F.conv1d(x, weight, bias, padding=padding, dilation=dilation, groups=heads))
        projection = parameters.projection[..., None]
        outputs.append(F.conv1d(x, projection, parameters.projection_bias, groups=heads)[0].T)
    return torch.cat(outputs)


def assert_same_gradients(actual: Tensor, expected: Tensor, inputs: dict[str, tuple[Tensor, Tensor]], tolerance: float):
    """Compares outputs and, for one random output gradient, the gradients of each (actual, expected) pair of inputs."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((actual * weight.to(actual.dtype)).sum(), [pair[0] for pair in inputs.values()])
    theirs = torch.autograd.grad((expected * weight).sum(), [pair[1] for pair in inputs.values()])
    for name, a, b in zip(inputs, ours, theirs, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(
            a.double() / scale,
            b / scale,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"d{name}: {text}",
        )


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The same random leaf twice: in `dtype`, and its exact value in float64 for the oracle."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_(), x.detach().double().requires_grad_()


def random_pieces(count: int, rounds: int, seed: int) -> list[list[int]]:
    """For each round, the number of new tokens of each sequence; decode steps and longer pieces alternate."""
    choice = random.Random(seed).choice
    return [
        [1] * count if choice((True, False)) else [choice((1, 2, 7, 33)) for _ in range(count)] for _ in range(rounds)
    ]


def cut(pieces: list[list[int]]) -> list[tuple[Sequences, Tensor]]:
    """(sequences with starts, rows of the packed whole) of each round."""
    totals = [sum(column) for column in zip(*pieces, strict=True)]
    borders = torch.tensor([0, *totals]).cumsum(0)[:-1]
    seen = torch.zeros(len(totals), dtype=torch.int64)
    rounds = []
    for lengths in pieces:
        ranges = [torch.arange(n) + b for n, b in zip(lengths, (borders + seen).tolist(), strict=True)]
        rounds.append((Sequences.of(lengths, starts=seen), torch.cat(ranges)))
        seen = seen + torch.tensor(lengths)
    return rounds
