"""What a recipe will be, before anything is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace

from megahybrid.config import Config
from megahybrid.config.batch import micro_batches
from megahybrid.errors import UserError
from megahybrid.mixers import KINDS
from megahybrid.model.settings import Settings
from megahybrid.scaling.flops import flops_per_token
from megahybrid.scaling.hours import Estimate, own_steps, tabled
from megahybrid.scaling.layouts import CLUSTER, Seconds, fitting, splits, volumes
from megahybrid.scaling.memory import ZERO_STAGES, activations, peak_bytes, reduction, start_up, states
from megahybrid.scaling.parameters import parameter_specs, parameters_by_rank
from megahybrid.scaling.splitting import gathered
from megahybrid.scaling.stages import layer_costs, stage_layers

REPLICAS = (1, 8, 64)
"""Data parallel sizes that the plan shows."""
_GIB = 2**30


def parameters_by_part(config: Config) -> Counter[str]:
    """Number of parameters of every part of the model, over all tensor parallel ranks."""
    letters = Settings.of(config).pattern.letters
    parts: Counter[str] = Counter()
    for name, spec in parameter_specs(config).items():
        parts[_part(name, letters)] += spec.full_size
    return parts


def describe(config: Config, estimate: Estimate | None = None) -> str:
    """Tables of the model's parameters and FLOPs by part, the run's steps and tokens, its pipeline's stages, and its
    memory a GPU; and the GPU hours, as estimated or else as tabled."""
    parameters = parameters_by_part(config)
    total = sum(parameters.values())
    rows = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in parameters.items()]
    sections = [
        table(("parameters", "number", "part"), [*rows, ("total", f"{total:,}", "")]),
        _flops(config),
        f"{_run(config)}\n{estimate or tabled(config)}",
        *([_stages(config)] if config.parallel.pipeline > 1 else []),
        _memory(config),
        *_without_choice(config),
    ]
    return "\n\n".join(sections)


def recommend(config: Config, gpus: int) -> str:
    """A table of the fastest layouts of so many GPUs, the keys of the first, and what it sends. Raises UserError where
    none fits."""
    found = fitting(config, gpus)
    if not found and not splits(config, gpus):
        raise UserError(
            f"No layout of {gpus} GPUs divides this recipe, whose train.global_batch_size is "
            f"{config.train.global_batch_size}; give another number of GPUs, or a batch that more replicas divide."
        )
    if not found:
        raise UserError(
            f"No layout of {gpus} GPUs fits this recipe into {_gib(CLUSTER.memory)} GiB of each; give "
            "train.recompute=all, another number of GPUs, or a train.global_batch_size that more replicas divide."
        )
    losses = [each.name for each in fields(Seconds)[1:] if each.name != "context" or config.parallel.context > 1]
    rows = []
    for layout in found:
        parallel, time = layout.config.parallel, layout.seconds
        context = f" × {parallel.context}" * (parallel.context > 1)
        split = f"{parallel.tensor}{context} × {parallel.pipeline}" + " interleaved" * (parallel.virtual_pipeline > 1)
        micro, count = layout.config.train.micro_batch_size, micro_batches(layout.config, layout.replicas)
        lost = [f"{getattr(time, name) / time.step:.1%}" for name in losses]
        figures = (f"{count} × {micro}", _gib(layout.peak), f"{time.step:.3g}", f"{time.share:.1%}", *lost)
        rows.append((f"{split} × {layout.replicas}, ZeRO {parallel.zero_stage}", *figures))
    shares = "tensor × context × pipeline × data" if config.parallel.context > 1 else "tensor × pipeline × data"
    head = (f"{gpus} GPUs: {shares}", "micro-batches", "GiB", "s a step", "share", *losses)
    sent = [(each.part, *map(_gib, (each.gradients, each.weights, each.activations))) for each in volumes(found[0])]
    return "\n\n".join(
        (
            table(head, rows),
            f"Recommended: {found[0].changes(config) or 'the recipe as it is'}",
            table(("GiB that a GPU sends a step, if it holds all layers", "gradients", "weights", "activations"), sent),
        )
    )


def _flops(config: Config) -> str:
    flops = flops_per_token(config)
    rows = [(name, f"{count / 1e6:,.1f}", f"{count / flops.forward:.1%}") for name, count in flops.parts.items()]
    rows.append(("forward", f"{flops.forward / 1e6:,.1f}", ""))
    rows.append(("forward and backward", f"{flops.training / 1e6:,.1f}", ""))
    return table(("FLOPs a token", "millions", "part"), rows)


def _run(config: Config) -> str:
    train = config.train
    step = train.global_batch_size * train.seq_length
    steps = own_steps(config)
    tokens = steps * step
    flops = flops_per_token(config).training * tokens
    after = f" after the trunk's {train.steps - steps:,}" if steps < train.steps else ""
    return f"{steps:,} steps of {step:,} tokens{after}: {tokens:,} tokens, {flops:.3g} FLOPs"


def _without_choice(config: Config) -> list[str]:
    """Kinds of mixers that choose what a query sees, but not in samples as short as these."""
    settings, length, found = Settings.of(config), config.train.seq_length, []
    for kind in (KINDS[letter] for letter in dict.fromkeys(settings.pattern.letters)):
        if length <= (after := kind.chooses_after(settings.model)):
            found.append(
                f"{kind.title} has nothing to choose in training: it begins to after {after:,} tokens of a document, "
                f"and train.seq_length is {length:,}."
            )
    return found


def _stages(config: Config) -> str:
    """What every pipeline rank holds, and its memory with one data parallel replica."""
    pipeline, costs = config.parallel.pipeline, layer_costs(config)
    every, parameters = stage_layers(config), parameters_by_rank(config)
    rows = []
    for rank, peak in enumerate(peak_bytes(config, 1)):
        chunks = every[rank::pipeline]
        layers = ", ".join("-".join(map(str, sorted({chunk[0], chunk[-1]}))) for chunk in chunks)
        part = sum(sum(costs[chunk.start : chunk.stop]) for chunk in chunks) / sum(costs)
        rows.append((str(rank), layers, f"{part:.1%}", f"{parameters[rank]:,}", _gib(peak)))
    gpus = config.parallel.replica
    return table(("pipeline rank", "layers", "time", "parameters a GPU", f"GiB, {gpus} GPUs"), rows)


def _memory(config: Config) -> str:
    """Parts of the memory on the pipeline rank that needs most, and what other choices of train.recompute need."""
    train, parallel, parameters = config.train, config.parallel, parameters_by_rank(config)
    peaks = [peak_bytes(config, size) for size in REPLICAS]
    fullest = list(zip(REPLICAS, (each.index(max(each)) for each in peaks), strict=True))
    saved = (_gib(activations(config, size, rank)) for size, rank in fullest)
    rows = [(f"activations and logits, {train.micro_batch_size} × {train.seq_length} tokens", *saved)]
    if parallel.zero_stage == 3:
        width = 2 if train.dtype == "bf16" else 4
        per_size = (width * gathered(config, size * parallel.context) for size in REPLICAS)
        rows.append(("working copies that ZeRO 3 has whole", *map(_gib, per_size)))
    if parallel.zero_stage > 1:
        reduced = (reduction(config, parameters[rank], size * parallel.context) for size, rank in fullest)
        rows.append(("gradients being reduced", *map(_gib, reduced)))
    for stage in ZERO_STAGES if parallel.pipeline == 1 else (1,):
        per_size = (states(config, parameters[rank], stage, size * parallel.context) for size, rank in fullest)
        rows.append((f"weights, gradients, optimizer: ZeRO {stage}", *map(_gib, per_size)))
    starts = [start_up(config, parameters[rank], size * parallel.context) for size, rank in fullest]
    largest = [start == max(each) for start, each in zip(starts, peaks, strict=True)]
    if any(largest):
        per_size = (_gib(start) if needed else "" for start, needed in zip(starts, largest, strict=True))
        rows.append(("before the first step, where that is most", *per_size))
    totals = (_gib(max(each)) for each in peaks)
    rows.append((f"this recipe: ZeRO {parallel.zero_stage}, train.recompute={train.recompute}", *totals))
    for other in _other_recomputes(config):
        totals = (_gib(max(peak_bytes(other, size))) for size in REPLICAS)
        rows.append((f"  or with train.recompute={other.train.recompute}", *totals))
    if parallel.pipeline > 1:
        rows.append(("pipeline rank that needs most", *(str(rank) for _, rank in fullest)))
    gpus = (str(size * parallel.replica) for size in REPLICAS)
    return table(("GiB a GPU, by number of GPUs", *gpus), rows)


def _other_recomputes(config: Config) -> list[Config]:
    """The recipe with every other train.recompute that is none, all or a letter."""
    letters, seen, others = Settings.of(config).pattern.letters, {frozenset(Settings.of(config).recompute)}, []
    for choice in ("none", "all", *dict.fromkeys(letters)):
        other = replace(config, train=replace(config.train, recompute=choice))
        recomputed = frozenset(Settings.of(other).recompute)
        if recomputed not in seen:
            seen.add(recomputed)
            others.append(other)
    return others


def _gib(count: float) -> str:
    return f"{count / _GIB:,.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first to the left, numbers to the right."""
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
    kind = KINDS[letters[int(words[1])]]
    return f"{kind.title}: {words[3] if words[3] in kind.parts else 'mixer'}"
