"""What a recipe will be, before anything is started."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state

from megahybrid.config import Config
from megahybrid.config.pattern import LETTERS
from megahybrid.model.stack import Stack
from megahybrid.scaling.flops import flops_per_token
from megahybrid.scaling.memory import ZERO_STAGES, activations, states

REPLICAS = (1, 8, 64)
"""Data parallel sizes that the plan shows."""
_GIB = 2**30


def parameters_by_part(config: Config) -> Counter[str]:
    """Number of parameters of every part of the model, over all tensor parallel ranks."""
    with _unsplit(), torch.device("meta"):
        model = Stack(config)
    letters = model.settings.pattern.letters
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[_part(name, letters)] += parameter.spec.full_size
    return parts


@contextlib.contextmanager
def _unsplit() -> Iterator[None]:
    """Where no process groups were made, let layers take their whole parameters without any: groups, and DeepSpeed's
    import with them, cost seconds that a plan does not need."""
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    parallel_state.set_tensor_model_parallel_world_size(1)
    parallel_state.set_tensor_model_parallel_rank(0)
    try:
        yield
    finally:  # these would also override groups that are made later
        parallel_state.set_tensor_model_parallel_world_size(None)
        parallel_state.set_tensor_model_parallel_rank(None)


def describe(config: Config) -> str:
    """Tables of the model's parameters and FLOPs by part, the run's steps and tokens, and its memory a GPU."""
    parameters = parameters_by_part(config)
    total = sum(parameters.values())
    rows = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in parameters.items()]
    sections = [
        _table(("parameters", "number", "part"), [*rows, ("total", f"{total:,}", "")]),
        _flops(config),
        _run(config),
        _memory(config, total),
    ]
    return "\n\n".join(sections)


def _flops(config: Config) -> str:
    flops = flops_per_token(config)
    rows = [(name, f"{count / 1e6:,.1f}", f"{count / flops.forward:.1%}") for name, count in flops.parts.items()]
    rows.append(("forward", f"{flops.forward / 1e6:,.1f}", ""))
    rows.append(("forward and backward", f"{flops.training / 1e6:,.1f}", ""))
    return _table(("FLOPs a token", "millions", "part"), rows)


def _run(config: Config) -> str:
    train = config.train
    step = train.global_batch_size * train.seq_length
    tokens = train.steps * step
    flops = flops_per_token(config).training * tokens
    return f"{train.steps:,} steps of {step:,} tokens: {tokens:,} tokens, {flops:.3g} FLOPs"


def _memory(config: Config, parameters: int) -> str:
    train, saved = config.train, activations(config)
    micro_batch = f"{train.micro_batch_size} × {train.seq_length} tokens"
    fixed = {
        f"activations, {micro_batch}": saved.kept,
        "  or with train.recompute": saved.recomputed,
        "logits and loss": saved.output,
    }
    rows = [(name, *[_gib(count)] * len(REPLICAS)) for name, count in fixed.items()]
    for stage in ZERO_STAGES:
        per_size = (states(config, parameters, stage, size) for size in REPLICAS)
        rows.append((f"weights, gradients, optimizer: ZeRO {stage}", *map(_gib, per_size)))
    stage, peak = config.parallel.zero_stage, saved.peak(train.recompute != "none")
    totals = (_gib(states(config, parameters, stage, size) + peak) for size in REPLICAS)
    how = "recomputed" if train.recompute != "none" else "kept"
    rows.append((f"this recipe: ZeRO {stage}, activations {how}", *totals))
    return _table(("GiB a GPU, by number of GPUs", *map(str, REPLICAS)), rows)


def _gib(count: float) -> str:
    return f"{count / _GIB:,.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, numbers to the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in (head, *rows))
    )


def _part(name: str, letters: str) -> str:
    words = name.split(".")
    if words[0] != "layers":
        return {"embedding": "embedding", "output": "output layer"}.get(words[0], "norms")
    if words[2].endswith("_norm"):
        return "norms"
    if words[2] == "mlp":
        return "SwiGLU"
    mixer = LETTERS[letters[int(words[1])]]
    return f"{mixer}: router" if words[3] == "router" else f"{mixer}: mixer"
