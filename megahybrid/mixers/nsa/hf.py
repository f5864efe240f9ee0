"""Native sparse attention of MegaHybrid language models (Yuan et al., arXiv 2502.11089)."""

import torch

from megahybrid.hf.layers_megahybrid import at_least_fp32, in_own_precision, kernels, linear
from megahybrid.mixers.attention.hf import Attention, attend

QUERY_BLOCK = 64  # queries at once, each with selected keys of its own


class NSAAttention(Attention):
    """Three attentions to the same keys and values, each with its gate: to the means of blocks of tokens, to the tokens
    of the blocks that a query selects for itself, and to a window.

    Configuration: `nsa` with what `attention` has elsewhere, `block_size`, `num_blocks` (that a
    query selects, the first one and its own last two included) and `window_size` (the query's own token included).
    State: `k, v` `[B, H, slots, D]`, in whose slot p is the token at position p, so that blocks begin at the same slots
    in sequences with padding; and the blocks' means `pooled_k, pooled_v` `[B, H, blocks, D]`, which no query sees while
    their block is not complete.
    """

    section = "nsa"
    packs = True

    def __init__(self, config):
        super().__init__(config)
        sizes = config.nsa
        self.block, self.count, self.window = sizes["block_size"], sizes["num_blocks"], sizes["window_size"]
        self.g_proj = linear(config.hidden_size, 3 * self.heads)

    def empty_state(self, x):
        nothing = x.new_zeros(len(x), self.kv_heads, 0, self.head_dim)
        return dict.fromkeys(("k", "v", "pooled_k", "pooled_v"), nothing)

    def packed_state(self, count, dtype, device):
        sizes = count, self.kv_heads, self.head_dim, self.block
        return {"cache": kernels.NSACache.empty(*sizes, dtype=dtype, device=device)}

    def packed(self, x, sequences, state):
        q, k, v, gates = self.project_packed(x, self.g_proj)
        o, after = self.mixed(q, k, v, gates, sequences, self.begun(state, k, sequences))
        return self.o_proj(o.flatten(-2)), after

    @in_own_precision
    def mixed(self, q, k, v, gates, sequences, state):
        q, k = self.rotate_packed(q, k, sequences)
        inputs, limits = (q, k, v, gates.unflatten(-1, (-1, 3)).sigmoid()), (self.block, self.count, self.window)
        if state is None:
            return kernels.native_sparse_attention(*inputs, sequences, *limits)[0], None
        inputs = *inputs, state["cache"], sequences
        o, cache = kernels.native_sparse_attention_with_cache(*inputs, *limits, in_place=True)
        return o, {"cache": cache}

    def forward(self, x, positions, state):
        if not isinstance(positions, torch.Tensor):
            return self.packed(x, positions, state)
        q, k, v = self.project(x)
        q, k = self.rotate(positions, q, k)
        after = self.extended(state, k, v, positions)
        # Rounded once, as what training multiplies with.
        gates = at_least_fp32(torch.sigmoid(self.g_proj(x))).unflatten(-1, (-1, 3)).transpose(1, 2)
        outputs = []
        for first in range(0, q.shape[2], QUERY_BLOCK):
            rows, at = q[:, :, first : first + QUERY_BLOCK], positions[:, first : first + QUERY_BLOCK]
            compressed, scores = self.compressed(rows, at, after)
            branches = compressed, self.selected(rows, at, scores, after), self.near(rows, at, after)
            weights = gates[:, :, first : first + QUERY_BLOCK].unbind(-1)
            o = sum(weight[..., None] * branch for weight, branch in zip(weights, branches, strict=True))
            outputs.append(o.to(x.dtype))
        return self.output(torch.cat(outputs, 2)), after

    def extended(self, state, k, v, positions):
        """The state with new keys and values `[B, H, T, D]`."""
        past, count = state["k"].shape[2], k.shape[2]
        # A sequence with padding has fewer tokens than there are slots: the last slot is not its own yet.
        slots = positions.where(positions >= 0, past + count - 1)
        begun = (positions.amax(1) + 1 - count).clamp(min=0) // self.block
        blocks = begun[:, None] + torch.arange(-(-count // self.block), device=k.device)
        after = {}
        for name, new in (("k", k), ("v", v)):
            rows = torch.cat([state[name], torch.zeros_like(new)], 2).scatter_(2, spread(slots, new), new)
            # Every block that gets a token is pooled anew from all of its own.
            means = at_least_fp32(taken(rows, self.tokens(blocks))).unflatten(2, (-1, self.block)).mean(3).to(new.dtype)
            pooled = state[f"pooled_{name}"]
            more = pooled.new_zeros(*k.shape[:2], -(-rows.shape[2] // self.block) - pooled.shape[2], self.head_dim)
            after[name] = rows
            after[f"pooled_{name}"] = torch.cat([pooled, more], 2).scatter_(2, spread(blocks, means), means)
        return after

    def tokens(self, blocks):
        """Slots of the tokens of blocks `[..., n]` → `[..., n block_size]`."""
        return (blocks[..., None] * self.block + torch.arange(self.block, device=blocks.device)).flatten(-2)

    @in_own_precision
    def compressed(self, q, positions, state):
        """Attention of q `[B, heads, n, D]` to the means of complete blocks, 0 where there is none; and what it weighs
        each block with, summed over the query heads of a KV head: `[B, H, n, blocks]`."""
        k, v = (at_least_fp32(state[f"pooled_{name}"]) for name in ("k", "v"))
        rows = at_least_fp32(q).unflatten(1, (self.kv_heads, -1))
        logits = (rows.flatten(2, 3) @ k.mT * self.head_dim**-0.5).unflatten(2, rows.shape[2:4])
        complete = torch.arange(k.shape[2], device=q.device) < ((positions + 1) // self.block)[:, None, None, :, None]
        weights = logits.masked_fill(~complete, -torch.inf).softmax(-1).masked_fill(~complete, 0)
        o = (weights.flatten(2, 3) @ v).unflatten(2, rows.shape[2:4])
        # Head by head: a reduction may round differently from column to column, and equal blocks would not be equal.
        return o.flatten(1, 2), sum(weights.unbind(2))

    def selected(self, q, positions, scores, state):
        """Attention to the tokens of the blocks with the highest scores, of equal ones the first; the sequence's first
        block and the query's own two last ones always."""
        blocks, own = torch.arange(scores.shape[-1], device=q.device), (positions // self.block)[:, None, :, None]
        ranks = scores.masked_fill((blocks == 0) | (blocks >= own - 1), torch.inf).masked_fill(blocks > own, -torch.inf)
        ranks, chosen = (x[..., : self.count] for x in ranks.sort(dim=-1, descending=True, stable=True))
        slots = self.tokens(chosen)
        there = (ranks > -torch.inf).repeat_interleave(self.block, -1)
        visible = there & (slots <= positions[:, None, :, None])
        # As many sequences as there are KV heads, with as many KV heads as there are queries.
        k, v = (taken(state[name], slots.flatten(2)).unflatten(2, slots.shape[2:]).flatten(0, 1) for name in ("k", "v"))
        rows = q.unflatten(1, (self.kv_heads, -1)).transpose(2, 3)
        o = attend(rows.flatten(2, 3).flatten(0, 1)[:, :, None], k, v, visible.flatten(0, 1)[:, :, None])
        return o.reshape(rows.shape).transpose(2, 3).flatten(1, 2)

    def near(self, q, positions, state):
        """Attention to the last `window_size` tokens, the query's own included."""
        width = self.window + q.shape[2] - 1
        slots = positions.amax(1, keepdim=True) - torch.arange(width, device=q.device)
        k, v = (taken(state[name], slots) for name in ("k", "v"))
        distance = positions[:, :, None] - slots[:, None]
        visible = (slots >= 0)[:, None] & (distance >= 0) & (distance < self.window)
        return attend(q, k, v, visible[:, None])


def spread(index, like):
    """int64 `[B, n]` for all heads and channels, or `[B, H, n]` for all channels, of `like` `[B, H, .., D]`."""
    index = index if index.dim() == 3 else index[:, None]
    return index[..., None].expand(-1, like.shape[1], -1, like.shape[-1])


def taken(x, slots):
    """Rows of `[B, H, N, D]` at int64 `[B, n]` or `[B, H, n]`; where there is no such row any other."""
    slots = (slots if slots.dim() == 3 else slots[:, None]).clamp(0, x.shape[2] - 1)
    sequence, head = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return x[sequence[:, None, None], head[:, None], slots]
