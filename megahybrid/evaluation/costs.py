"""What a sequence of some length costs: its state, reading it, and a token more."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from megahybrid.devices import free_memory
from megahybrid.inference import states
from megahybrid.inference.batch import Batch
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups

_STEPS, _BEFORE = 16, 3  # measured, and before them: compiled, recorded as a graph


def require_memory(model: Stack, sequences: int, length: int) -> None:
    """Raise MemoryError, on all processes, where some have less memory left than the states of so many sequences of
    `length` tokens take at least. A system that runs out of memory later kills a process, or one alone fails."""
    needed = states.size_in_bytes(model.initial_states(sequences), length)
    if groups.max_over_all(int(needed > free_memory(next(model.parameters()).device))):
        raise MemoryError


def measure(model: Stack, tokens: Sequence[int], prefill_chunk: int) -> dict[str, Any]:
    """Read one sequence and write some tokens behind it; called by every process.

    Returns its length, the state's size over all tensor parallel ranks (MiB), the speed of prefill (tokens/s) and the
    median time of decoding a token (ms).
    """
    # What is compiled and tuned at a first call is no part of it: two pieces are as all others.
    _read(model, tokens[: 2 * prefill_chunk], prefill_chunk)
    batch, seconds = _read(model, tokens, prefill_chunk)
    state_bytes, times = sum(groups.gather(batch.state_bytes)), []
    for _ in range(_BEFORE + _STEPS):
        batch.extend(0, int(tokens[-1]))
        began = _now(model)
        batch.step()
        times.append(_now(model) - began)
    return {
        "length": len(tokens),
        "state_mib": round(state_bytes / 2**20, 4),
        "prefill_tokens_per_second": round(len(tokens) / seconds, 1),
        "decode_ms": round(1e3 * statistics.median(times[_BEFORE:]), 4),
    }


def _read(model: Stack, tokens: Sequence[int], prefill_chunk: int) -> tuple[Batch, float]:
    batch = Batch(model, prefill_chunk)
    batch.add([list(tokens)])
    began = _now(model)
    while not batch.step()[0]:
        pass
    return batch, _now(model) - began


def _now(model: Stack) -> float:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
