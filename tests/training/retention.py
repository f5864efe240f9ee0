"""Retention scores in every step of a run, recorded by the workers that train, and the decisions that follow."""

from unittest import mock

import torch

from megahybrid_kernels import Sequences
from megahybrid_kernels.exit_positions import exit_positions


def train(recipe, *overrides):
    """One rank of a run. By LTE layer a list of, for one pass: keys int64 `[tokens]`, which
    tell a token of a step from all others of the run, whatever the layout; this rank's first KV head; scores
    `[tokens, heads]`; and the lengths of the micro-batch's documents."""
    from megahybrid.config import load_config
    from megahybrid.mixers.lte.module import LTEAttention
    from megahybrid.training import loop

    record, real = {}, LTEAttention._aux

    def noted(mixer, scores, context, rows=slice(None), *more):
        entry = context.dropout_keys[0][rows], mixer.first_head, scores.detach(), context.sequences.lengths
        record.setdefault(mixer.layer, []).append(entry)
        return real(mixer, scores, context, rows, *more)

    with mock.patch.object(LTEAttention, "_aux", noted):
        loop.train(load_config(recipe, overrides))
    return record


def steps_alike(ranks, alone, lte, step_tokens, apart):
    """Steps before the first in which some token stays in a capped buffer for another number of queries than in the
    run of one process, which recomputes nothing. Up to that decision all scores have to be less than `apart` apart."""
    layers = {layer: compared(ranks, layer, alone[layer], lte) for layer in sorted(alone)}
    steps = min(len(difference) for difference, _ in layers.values()) // step_tokens
    for step in range(steps):
        tokens = slice(step * step_tokens, (step + 1) * step_tokens)
        for layer, (difference, turned) in layers.items():
            assert float(difference[tokens].max()) < apart, (layer, step + 1)
            if turned[tokens].any():
                return step
    return steps


def compared(ranks, layer, entries, lte):
    """Of a layer's tokens, in the order of one process: how far a score is from that one's, of the heads the farthest;
    and whether a head's capped buffer keeps it for another number of queries."""
    keys, _, expected, lengths = zip(*entries, strict=True)
    keys, expected = torch.cat(keys), torch.cat(expected)
    order, found = keys.argsort(), torch.full_like(expected, torch.nan)
    for keys_here, head, scores, _ in (entry for rank in ranks for entry in rank.get(layer, [])):
        place = order[torch.searchsorted(keys[order], keys_here)]
        assert torch.equal(keys[place], keys_here)
        found[place, head : head + scores.shape[1]] = scores
    assert not found.isnan().any()
    documents = Sequences.of([length for each in lengths for length in each])
    sizes = documents, lte.window_size, lte.sink_size, lte.buffer_size
    turned = exit_positions(found, *sizes) != exit_positions(expected, *sizes)
    return (found - expected).abs().amax(1), turned.any(1)
