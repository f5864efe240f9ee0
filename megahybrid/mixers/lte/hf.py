"""Learnable token eviction of MegaHybrid language models (He & Garner, arXiv 2510.20787)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from megahybrid.hf.layers_megahybrid import at_least_fp32, in_own_precision, kernels, last
from megahybrid.mixers.attention.hf import QUERY_BLOCK, Attention, appended, attend, in_window, newest


class LTEAttention(Attention):
    """A query sees a window and, per KV head, a buffer of the older tokens with the highest positive scores.

    Configuration: `attention`, and `lte` with `window_size` w (a query sees itself and the w tokens before it),
    `buffer_size` (older tokens that a head holds, sinks included), `sink_size` (first tokens, always held),
    `conv_size` and `conv_dilation` of the router.
    State: the window's `k, v` `[B, H, w + 1, D]`, `positions` `[B, w + 1]` and `score` `[B, H, w + 1]`; the buffer's
    `buffer_k, buffer_v` `[B, H, b, D]`, `buffer_score, buffer_positions` `[B, H, b]`; the router's `rows0..2`.
    """

    packs = True

    def __init__(self, config):
        super().__init__(config)
        lte = config.lte
        self.columns, self.buffer, self.sinks = lte["window_size"] + 1, lte["buffer_size"], lte["sink_size"]
        self.router = Router(self.kv_heads, self.head_dim, lte["conv_size"], lte["conv_dilation"])

    def empty_state(self, x):
        window, buffer = self.empty_columns(x, self.columns), self.empty_columns(x, self.buffer)
        score = at_least_fp32(x).new_zeros
        return {
            **window,
            "score": score(len(x), self.kv_heads, self.columns),
            "buffer_k": buffer["k"],
            "buffer_v": buffer["v"],
            "buffer_score": score(len(x), self.kv_heads, self.buffer),
            "buffer_positions": buffer["positions"][:, None].expand(-1, self.kv_heads, -1),
            **self.router.empty_state(x),
        }

    def packed_state(self, count, dtype, device):
        sizes = count, self.kv_heads, self.head_dim, self.columns - 1, self.buffer
        cache = kernels.LTECache.empty(*sizes, dtype=dtype, device=device)
        return {**vars(cache), **self.router.packed_state(count)}

    def packed(self, x, sequences, state):
        o, after = self.mixed(*self.project_packed(x), sequences, state)
        return self.o_proj(o.flatten(-2)), after

    @in_own_precision
    def mixed(self, q, k, v, sequences, state):
        scores, k, v, rows = self.router(k, v, sequences, state)
        inputs = *self.rotate_packed(q, k, sequences), v, scores
        limits = self.columns - 1, self.sinks, self.buffer
        if state is None:
            o, cut = kernels.lte_attention(*inputs, sequences, *limits), sequences.remaining < self.router.margin
            return o, {"loss": excess(scores, cut[:, None]).sum(0, keepdim=True)} if self.training else None
        cache = {name: x for name, x in state.items() if not name.startswith("rows")}
        cache = kernels.LTECache(**cache) if cache else None
        inputs = *inputs, cache, sequences
        o, cache = kernels.lte_attention_with_cache(*inputs, *limits, self.router.margin, in_place=True)
        return o, {**vars(cache), **rows}

    def forward(self, x, positions, state):
        if not isinstance(positions, torch.Tensor):
            return self.packed(x, positions, state)
        q, k, v = self.project(x)
        margin = self.router.margin
        # Scores come `margin` tokens late, and before their tokens leave the window; for a gradient also those of the
        # last tokens, as if nothing followed.
        ahead = margin if torch.is_grad_enabled() else 0
        scores, after = self.router(k, v, positions, state, ahead)
        if self.training:
            arrived = scores[:, :, : k.shape[2]].mT
            after["loss"] = excess(arrived, (positions < margin)[..., None]).sum(1)
        q, k = self.rotate(positions, q, k)
        columns = appended(state, k, v, positions)
        known = torch.cat([state["score"][:, :, : self.columns - margin], scores], 2)
        columns["score"] = F.pad(known, (0, margin - ahead))
        if scores.requires_grad:
            columns["v"] = StraightThrough.apply(columns["v"], columns["score"])
        buffer = {name: state[f"buffer_{name}"] for name in ("k", "v", "score", "positions")}
        outputs = []
        for first in range(0, q.shape[2], QUERY_BLOCK):
            rows = q[:, :, first : first + QUERY_BLOCK]
            o, buffer = self.block(rows, columns, buffer, first)
            outputs.append(o)
        after.update(newest(columns, self.columns))
        after.update({f"buffer_{name}": x for name, x in buffer.items()})
        return self.output(torch.cat(outputs, 2)), after

    def block(self, q, columns, buffer, first):
        """Queries `[B, heads, n, D]` from column `first` of the new ones on: (output, the buffer after them).

        Query i sees the w + 1 columns up to its own; the column before these arrives at the buffer with it.
        """
        count = q.shape[2]
        known = {name: x.narrow(2 if x.dim() == 4 else -1, first, self.columns + count) for name, x in columns.items()}
        arriving = {name: x.narrow(2 if x.dim() == 4 else -1, 0, count) for name, x in known.items()}
        arriving["positions"] = arriving["positions"][:, None].expand(-1, self.kv_heads, -1)
        candidates = {name: torch.cat([buffer[name], arriving[name]], 2) for name in buffer}
        held = self.held(candidates["score"], candidates["positions"], count)
        older, arrived = held.split([self.buffer, count], -1)
        near = in_window(known["positions"], count).expand(-1, self.kv_heads, -1, -1)
        visible = torch.cat([older, near[..., :count] | arrived, near[..., count:]], -1)
        k, v = (torch.cat([buffer[name], known[name]], 2) for name in ("k", "v"))
        kept = held[..., -1, :]
        best = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., : self.buffer]
        blank, after = ~kept.gather(2, best), {}
        for name, x in candidates.items():
            if x.dim() == 4:
                after[name] = x.gather(2, best[..., None].expand(-1, -1, -1, self.head_dim))
            else:
                after[name] = x.gather(2, best).masked_fill(blank, -1 if name == "positions" else 0)
        return attend(q, k, v, visible), after

    def held(self, score, positions, count):
        """bool `[B, H, count, b + count]`: whether the buffer holds a candidate when each of `count` queries looks.

        score, positions `[B, H, b + count]`: the buffer's candidates, then those that arrive, one with each query. One
        is held from its arrival until `b` that outrank it have arrived: sinks first, then the higher score, then the
        earlier position.
        """
        candidate = (positions >= 0) & ((score > 0) | (positions < self.sinks))
        rank = torch.where(positions < self.sinks, torch.inf, score).masked_fill(~candidate, -torch.inf)
        higher = rank[..., :, None] > rank[..., None, :]
        tied = (rank[..., :, None] == rank[..., None, :]) & (positions[..., :, None] < positions[..., None, :])
        outranks = higher | tied
        at_first = outranks[..., : self.buffer, :].sum(-2, keepdim=True, dtype=torch.int32)
        outranking = at_first + outranks[..., self.buffer :, :].cumsum(-2, dtype=torch.int32)
        arrival = torch.arange(-self.buffer, count, device=score.device)
        arrived = arrival <= torch.arange(count, device=score.device)[:, None]
        return candidate[..., None, :] & arrived & (outranking < self.buffer)


def excess(scores, cut):
    """What L1 asks to be small, `[…]`: the mean of all heads' positive scores `[…, H]`, where the right context of a
    token is not cut off."""
    return scores.masked_fill(cut, 0).relu().mean(-1)


class StraightThrough(torch.autograd.Function):
    """v `[B, H, n, D]` as it is. What it leaves out of sight has no gradient; instead the score `[B, H, n]` gets that
    of a gate on v, which is 1 (equation 6)."""

    @staticmethod
    def forward(ctx, v, score):
        ctx.save_for_backward(v)
        ctx.dtype = score.dtype
        return v.view_as(v)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad, (at_least_fp32(grad) * at_least_fp32(v)).sum(-1).to(ctx.dtype)


class Router(nn.Module):
    """Retention scores from three dilated convolutions over time and a projection, one network a KV head.

    State: the convolutions' last inputs `rows0..2` `[B, (taps - 1) dilation, H C]`. A score needs `margin` tokens on
    either side, and comes that many tokens late.
    """

    def __init__(self, heads, head_dim, taps, dilation):
        super().__init__()
        self.heads, self.dilation, self.reach = heads, dilation, (taps - 1) * dilation
        self.channels = [2 * head_dim >> halvings for halvings in range(4)]
        self.margin = 3 * self.reach // 2
        for number in range(3):
            fan_in, out = self.channels[number], self.heads * self.channels[number + 1]
            self.register_parameter(f"conv{number}_weight", nn.Parameter(torch.empty(out, fan_in, taps)))
            self.register_parameter(f"conv{number}_bias", nn.Parameter(torch.empty(out)))
        self.projection = nn.Parameter(torch.empty(heads, self.channels[-1]))
        self.projection_bias = nn.Parameter(torch.empty(heads))

    def reset_parameters(self):
        for number in range(3):
            weight = getattr(self, f"conv{number}_weight")
            weight.normal_(0, math.sqrt(2 / weight[0].numel()))
            getattr(self, f"conv{number}_bias").zero_()
        self.projection.normal_(0, math.sqrt(2 / self.projection.shape[1]))
        self.projection_bias.fill_(0.5)

    def empty_state(self, x):
        zeros = at_least_fp32(x).new_zeros
        return {f"rows{n}": zeros(len(x), self.reach, self.heads * self.channels[n]) for n in range(3)}

    def packed_state(self, count):
        return self._named(kernels.RouterState.empty(count, self._parameters_of_op(), self.dilation))

    def packed(self, k, v, sequences, state):
        """k, v `[tokens, H, D]` → (scores `[tokens, H]`, with a state of the tokens `margin` earlier; k and v for all
        other uses; the next state)."""
        parameters = self._parameters_of_op()
        if state is None:
            return *kernels.retention_scores(k, v, parameters, sequences, None, self.dilation), None
        rows = kernels.RouterState(tuple(state[f"rows{n}"] for n in range(3))) if state else None
        scores, rows = kernels.retention_scores_streamed(k, v, parameters, sequences, rows, self.dilation)
        return scores, k, v, self._named(rows)

    @staticmethod
    def _named(state):
        return {f"rows{number}": rows for number, rows in enumerate(state.rows)}

    def _parameters_of_op(self):
        weights, biases = ([getattr(self, f"conv{n}_{name}") for n in range(3)] for name in ("weight", "bias"))
        return kernels.RouterParameters(tuple(weights), tuple(biases), self.projection, self.projection_bias)

    @in_own_precision
    def forward(self, k, v, positions, state, ahead=0):
        """k, v `[B, H, T, D]`, k not rotated → scores in (-1/2, 1/2) `[B, H, T + ahead]` of tokens `margin` earlier;
        of the last `ahead` as if no token followed the new ones."""
        if not isinstance(positions, torch.Tensor):
            return self.packed(k, v, positions, state)
        after = {}
        x = at_least_fp32(torch.cat([k, v], -1)).transpose(1, 2).flatten(-2)
        count, end = x.shape[1], None
        if ahead:
            # Places go on behind the last token: what looks ahead of it is still about those before.
            x, row, end = F.pad(x, (0, 0, 0, ahead)), torch.arange(count + ahead, device=x.device), positions.amax(1)
            positions = (positions - row[:count]).where(positions >= 0, -(2**62)).amax(1, keepdim=True) + row
        for number in range(3):
            # Where there is no token of the sequence, the next layer must find zeros, as its padding would be.
            outside = positions < 0 if end is None else (positions < 0) | (positions > end[:, None])
            x = x.masked_fill(outside[..., None], 0)
            rows = torch.cat([state[f"rows{number}"], x], 1)
            after[f"rows{number}"] = last(rows[:, : count + self.reach], 1, self.reach)
            weight, bias = (getattr(self, f"conv{number}_{name}").to(x.dtype) for name in ("weight", "bias"))
            x = F.silu(F.conv1d(rows.mT, weight, bias, dilation=self.dilation, groups=self.heads)).mT
            positions = positions - self.reach // 2
        x = x.unflatten(-1, (self.heads, -1))
        logits = (x * self.projection.to(x.dtype)).sum(-1) + self.projection_bias.to(x.dtype)
        return torch.sigmoid(logits).mT - 0.5, after
