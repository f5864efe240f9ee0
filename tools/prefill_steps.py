"""What `bench_generate` measures of prefill: prompts of one length, read as `megahybrid generate` reads them."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from megahybrid.inference import states as state_tools
from megahybrid.model.context import Context
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid_kernels import Sequences

PASSES = 9


def sequences_at_once(context: int, batch: int, together: int) -> int:
    """How many prompts of `context` tokens, of `batch`, have `together` tokens; one at least."""
    return max(1, min(batch, together // context))


def prefill(model: Stack, context: int, batch: int, together: int, chunk: int, limit: float) -> dict:
    """`batch` prompts of `context` tokens: as many side by side as have `together` tokens, the others after them.

    Such a pass is timed `PASSES` times, since the first are slower, or as often as the batch needs it if that is more,
    as far as the time limit (seconds) goes, and once at least. Before it two pieces are read untimed, which compiles.
    What the passes of a batch leave behind is kept, as generation needs all of it; states that were not reached within
    the time are added to the memory by their size.
    """
    count = sequences_at_once(context, batch, together)
    needed = -(-batch // count)
    read_prompts(model, min(context, 2 * chunk), count, chunk)
    kept, seconds, began = [], [], time.perf_counter()
    for number in range(max(needed, PASSES)):
        if number and time.perf_counter() - began > limit:
            break
        before = time.perf_counter()
        states = read_prompts(model, context, count, chunk)
        seconds.append(time.perf_counter() - before)
        if len(kept) < needed:
            kept.append(states)
        del states  # or else the next pass would have those of this one beside it
    size = state_tools.size_in_bytes(kept[0])
    median = statistics.median(seconds)
    result = {"tokens_per_second": round(count * context / median), "pass_ms": round(1e3 * median, 2)}
    result |= {"pass_sequences": count, "passes": len(seconds), "chunk": min(chunk, context)}
    result["ms_of_passes"] = [round(1e3 * each, 2) for each in seconds[:PASSES]]
    result["state_mib"] = size * needed >> 20
    if torch.cuda.is_available():
        missing = size * (needed - len(kept))
        result["batch_peak_mib"] = (torch.cuda.max_memory_allocated() + missing) >> 20
    return result


@torch.inference_mode()
def read_prompts(model: Stack, context: int, count: int, chunk: int) -> dict[int, Any]:
    """The states after `count` prompts of random tokens; waits until their next tokens are known on the host."""
    device = groups.device()
    tokens = torch.randint(0, model.settings.model.vocab_size, (count, context), device=device)
    states = None
    for start in range(0, context, chunk):
        piece = tokens[:, start : start + chunk]
        starts = torch.full((count,), start, device=device) if start else None
        sequences = Sequences.of([piece.shape[1]] * count, device, starts)
        out = model(piece.flatten(), Context(sequences, keep_states=True, in_place=True), states=states)
        states = out.states
    last = out.hidden[sequences.cu_seqlens[1:].long() - 1]
    model.logits(last).argmax(-1).tolist()
    return states
