"""Which blocks NSA selects in every step of a run, and by how much: what a worker records while it trains."""

import contextlib

import torch

from megahybrid.mixers.nsa import module
from tests.training import test_layouts


def train(recipe, *overrides, stop_after=None):
    """One rank of a run, as `test_layouts.train`; by layer what `Record.of` says."""
    record = Record()
    with record.made():
        test_layouts.train(recipe, *overrides, stop_after=stop_after)
    return record.of


class Record:
    """Attributes:
    of: by layer a list of, for one pass: keys int64 `[tokens]`, which tell a token of a step from all others of the
        run, whatever the layout; this rank's first KV head; selections `[tokens, kv_heads, blocks]`; and margins
        `[tokens, kv_heads]`, by which the least of the chosen free blocks is better than the best of the others.
    """

    def __init__(self):
        self.of = {}

    @contextlib.contextmanager
    def made(self):
        forward, attend = module.NSAAttention.forward, module.native_sparse_attention
        now = {}

        def noted(mixer, x, context, state=None):
            now["mixer"], now["context"] = mixer, context
            return forward(mixer, x, context, state)

        def attended(q, k, *more):
            o, selection = attend(q, k, *more)
            mixer, context = now["mixer"], now["context"]
            if context.training:
                margins = self._margins(mixer, q, k, selection, context.sequences)
                entry = context.dropout_keys[0], first_head(mixer), selection, margins
                self.of.setdefault(mixer.layer, []).append(entry)
            return o, selection

        module.NSAAttention.forward, module.native_sparse_attention = noted, attended
        try:
            yield
        finally:
            module.NSAAttention.forward, module.native_sparse_attention = forward, attend

    def _margins(self, mixer, q, k, selection, sequences):
        if mixer.sharers > 1:
            return torch.full(selection.shape[:2], torch.nan)
        return torch.cat(
            [
                margins(*(x.detach()[begin:end].double() for x in (q, k)), selection[begin:end], mixer.limits[0])
                for begin, end in zip(sequences.borders, sequences.borders[1:], strict=False)
            ]
        )


def first_head(mixer):
    from megahybrid.parallel import groups

    rank, ranks = groups.head_parallel()
    return rank * mixer.settings.model.nsa.num_kv_heads // ranks


def margins(q, k, selection, block_size):
    """Of one document; infinity where all blocks are selected."""
    (tokens, heads), blocks = k.shape[:2], len(k) // block_size
    means = k[: blocks * block_size].unflatten(0, (blocks, block_size)).mean(1)
    logits = torch.einsum("thgd,nhd->thgn", q.unflatten(1, (heads, -1)), means) / q.shape[2] ** 0.5
    t, n = torch.arange(tokens)[:, None, None], torch.arange(blocks)
    seen = (n < (t + 1) // block_size)[:, :, None]
    scores = logits.masked_fill(~seen, -torch.inf).softmax(-1).sum(2)
    free = (n >= 1) & (n <= t // block_size - 2)
    chosen = (selection[:, :, :, None] == n).any(2)
    least = (
        scores.masked_fill(~(free & chosen), torch.inf).amin(2) if blocks else torch.full((tokens, heads), torch.inf)
    )
    best = scores.masked_fill(~free | chosen, -torch.inf).amax(2) if blocks else -least
    return least - best


def train_and_stop(recipe, stop_after, *overrides):
    return train(recipe, *overrides, stop_after=stop_after)
