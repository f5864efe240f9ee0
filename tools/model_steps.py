"""Real training steps on random tokens, timed: what tools/bench_model runs in each of its processes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence

import step_parts
import torch
from torch.profiler import ProfilerActivity, profile

from megahybrid.config import load_config
from megahybrid.data.packing import Batch
from megahybrid.devices import prepare_allocator
from megahybrid.model.context import Context
from megahybrid.parallel import groups
from megahybrid.scaling.flops import flops_per_token
from megahybrid.scaling.memory import peak_bytes
from megahybrid.training.engine import Engine
from megahybrid.training.speed import model_flops_utilization
from megahybrid.training.step_report import StepReport
from megahybrid.training.trial import random_batches
from megahybrid_kernels import dropout_keys

# Of our kernels by the op that their names begin with, of others by the first whose words stand in the name.
OPS = {
    "native_sparse_attention": "NSA",
    "lte_attention": "LTE",
    "exit_positions": "LTE",
    "gated_delta_rule": "delta rule",
    "retention_router": "router",
    "counter_dropout": "router",
    "attention": "attention",
    "causal_conv1d": "conv, norm, rotary, SwiGLU",
    "norm": "conv, norm, rotary, SwiGLU",
    "rotary": "conv, norm, rotary, SwiGLU",
    "gemv": "matmul",
    "swiglu": "conv, norm, rotary, SwiGLU",
    "shares": "conv, norm, rotary, SwiGLU",
    "linear_cross_entropy": "loss",
}
OTHERS = {
    "attention": ("flash", "fmha", "cudnn"),
    "matmul": ("gemm", "nvjet", "cutlass", "wgmma", "splitK"),
    "optimizer": ("multi_tensor", "adam"),
    "copies": ("Memcpy", "Memset", "copy"),
    "elementwise": ("elementwise", "reduce", "index"),
}


def part_of(kernel: str) -> str:
    """The part of a step that a kernel of this name belongs to."""
    ours = [part for op, part in OPS.items() if kernel.startswith(f"{op}_")]
    return (ours + [part for part, words in OTHERS.items() if any(word in kernel for word in words)] + ["other"])[0]


def ready() -> None:
    """Nothing: a process that has been called has everything imported."""


def measure(
    recipe: str,
    overrides: Sequence[str],
    steps: int,
    with_parts: bool = False,
    kept: float | None = None,
    warm_up: int = 2,
    traced: int = 0,
) -> dict:
    """Train `steps` steps after `warm_up`; this rank's figures. A collective of all processes of the layout.

    Args:
        with_parts: whether to add the GPU's time by kernels' names, of one more step.
        kept: the share of tokens that LTE's heads keep at first, as after training; None leaves routers as they are.
        traced: micro-batches of one more step whose time by part is added on the first and the last rank; 0 for none.
    """
    config = load_config(recipe, overrides)
    prepare_allocator()
    groups.initialize(config.parallel, config.train.seed)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    engine = Engine(config)
    engine.initialize()
    start = {"start_seconds": round(time.perf_counter() - began, 1)}
    if torch.cuda.is_available():
        start["start_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.reset_peak_memory_stats()
    batches = random_batches(config)
    if kept is not None:
        keep(engine, batches[0], kept)
    results, seconds = [], []
    for step in range(1, warm_up + steps + 1):
        began = time.perf_counter()
        results.append(engine.step(batches, step))
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[warm_up:])
    speed = config.train.global_batch_size * config.train.seq_length / median
    figures = {
        "tokens_per_second": round(speed),
        "mfu": round(model_flops_utilization(flops_per_token(config).training, speed).get("mfu", 0), 4),
        "step_seconds": round(median, 4),
        **start,
        "first_step_seconds": round(seconds[0], 1),
        "seconds_of_steps": [round(each, 3) for each in seconds],
        "losses": [result.loss for result in results],
        "grad_norms": [round(result.grad_norm, 5) for result in results],
        "kept": [
            round(float(head), 1) for each in engine.regulators.values() for head in each.metrics()["kept"][0, :4]
        ],
        "micro_batch": config.train.micro_batch_size,
        "micro_batches": len(batches),
        "samples": config.train.global_batch_size,
        "seq_length": config.train.seq_length,
    }
    if torch.cuda.is_available():
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        figures["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        figures["predicted_gib"] = round(max(peak_bytes(config, groups.data_parallel()[1])) / 2**30, 2)
        if with_parts:
            figures["parts"] = parts(engine, batches, warm_up + steps + 1)
        figures["device"] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    if traced:
        figures["time_by_part"] = step_parts.traced(engine, batches[:traced], warm_up + steps + 1)
    engine.zero.destroy()
    del engine, batches
    free_tensors()
    return figures


def free_tensors() -> None:
    """Empty what is left of an engine: DeepSpeed's hooks and marks on parameters keep it alive, unseen by Python."""
    gc.collect()
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            if storage.nbytes() > 2**20 and storage.resizable():
                storage.resize_(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def keep(engine: Engine, batch: Batch, share: float) -> None:
    """Set the biases of all routers, a head each, so that this share of the batch's tokens, and those that other
    replicas have of it, has a positive score. A collective of all processes; without a pipeline."""
    letters, count = engine.settings.pattern.letters, len(batch.tokens)
    layers = engine.settings.pattern.layers("L")
    if not layers:
        return
    assert groups.pipeline_parallel()[1] == 1
    keys = dropout_keys(batch.samples, batch.sample_positions, 0, 0, len(letters)).to(engine.device)
    part = batch.part(*groups.context_parallel()).to(engine.device)
    context = Context(part.sequences, keys)
    biases = [engine.model.layers[str(layer)].mixer.router.projection_bias for layer in layers]
    rank, ranks = groups.tensor_parallel()
    (heads,) = biases[0].spec.shape
    low, high = (torch.full((len(layers), heads), end, device=engine.device) for end in (-16.0, 16.0))
    for _ in range(12):
        middle = (low + high) / 2
        for bias, values in zip(biases, middle.chunk(ranks, 1)[rank], strict=True):
            begin, master = engine.zero.place(bias)
            master.copy_(values[begin : begin + len(master)])
        engine.zero.round_masters()
        report = StepReport(letters, engine.regulators, engine.device)
        for layer, aux in engine.model(part.tokens, context).aux.items():
            report.add(layer, aux)
        report.sum_over_all()
        many = report.counts["L"]["kept"] > share * count * groups.data_parallel()[1]
        low, high = torch.where(many, low, middle), torch.where(many, middle, high)


def parts(engine: Engine, batches: list[Batch], step: int) -> dict[str, float]:
    """ms of the GPU by part, of one step."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        engine.step(batches, step)
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    rest: dict[str, float] = {}
    for event in record.key_averages():
        ms = event.self_device_time_total / 1e3
        part = part_of(event.key)
        found[part] = found.get(part, 0) + ms
        if part == "other" and ms:
            rest[event.key[:40]] = ms
    found |= {f"other: {name}": ms for name, ms in sorted(rest.items(), key=lambda item: -item[1])[:3]}
    return {part: round(ms, 2) for part, ms in sorted(found.items(), key=lambda item: -item[1]) if ms > 0.05}
