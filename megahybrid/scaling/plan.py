"""What a recipe will be, before anything is started."""

from __future__ import annotations

from collections import Counter

import torch

from megahybrid.config import Config
from megahybrid.config.pattern import LETTERS
from megahybrid.config.schema import ParallelConfig
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups


def parameters_by_part(config: Config) -> Counter[str]:
    """Number of parameters of every part of the model, over all tensor parallel ranks."""
    groups.initialize(ParallelConfig())
    with torch.device("meta"):
        model = Stack(config)
    letters = model.settings.pattern.letters
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[_part(name, letters)] += parameter.spec.full_size
    return parts


def describe(config: Config) -> str:
    """A table of the model's parameters by part and the run's steps and tokens."""
    parts, train = parameters_by_part(config), config.train
    total = sum(parts.values())
    rows = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in parts.items()]
    rows.append(("total", f"{total:,}", ""))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'parameters':<{width}} {'number':>15} {'part':>7}"]
    lines += [f"{name:<{width}} {count:>15} {part:>7}" for name, count, part in rows]
    tokens = train.global_batch_size * train.seq_length
    lines += ["", f"{train.steps:,} steps of {tokens:,} tokens: {train.steps * tokens:,} tokens"]
    return "\n".join(lines)


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
