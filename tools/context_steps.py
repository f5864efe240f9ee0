"""Single mixers over one process or several context parallel ones, judged and timed: what tools/bench_context runs."""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from context_case import JUDGED, VARIANTS, Given
from torch import Tensor

from megahybrid.config import Config
from megahybrid.config.schema import ParallelConfig
from megahybrid.devices import prepare_allocator
from megahybrid.errors import UserError
from megahybrid.key import derived
from megahybrid.mixers import KINDS
from megahybrid.mixers.lte import most_room, room_for
from megahybrid.model.context import Context
from megahybrid.model.loss import attach_loss
from megahybrid.model.mixer import Mixer
from megahybrid.model.settings import Settings
from megahybrid.parallel import groups
from megahybrid.parallel.heads import gather_tokens
from megahybrid.parallel.parameters import initialize_parameters, materialize
from megahybrid_kernels import Sequences, dropout_keys
from megahybrid_kernels.retention_router import retention_logits

STAY, EXCHANGE = "tokens stay", "tokens for heads"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# An error may be so many times one process's, and so much more; zeros may be as large.
WORSE, FLOOR = 2.0, {torch.bfloat16: 0.01, torch.float32: 1e-4}
Errors = dict[str, float]


class Pass:
    """A mixer with weights from the seed, and an input and cotangent that all layouts share, this rank's part."""

    def __init__(
        self,
        config: Config,
        lengths: Sequence[int],
        dtype: torch.dtype,
        bias: Sequence[float],
        stays: float | None = None,
    ):
        """stays: where ranks keep their tokens, the share of them that L's heads retain."""
        (letter,), device = config.model.pattern, groups.device()
        rank, ranks = groups.context_parallel()
        self.own = sum(lengths) // ranks
        settings = replace(Settings.of(config), keepers="" if stays is None else letter)
        with torch.device("meta"):
            self.mixer: Mixer = KINDS[letter].module()(settings, 0)
        rounded = DTYPES[config.train.dtype]
        materialize(self.mixer, device, rounded)
        initialize_parameters(self.mixer, config.train.seed)
        if letter == "L":
            self.mixer.l1_lambda = torch.ones(self.mixer.heads, device=device)
            if stays is not None:
                self.make_room(stays)
            if bias:
                self.mixer.router.projection_bias.data.copy_(torch.tensor(bias))
        self.mixer.to(dtype)
        self.context = _context(lengths, device)
        generator = torch.Generator(device).manual_seed(1)
        shape = sum(lengths), 1, config.model.hidden_size
        # One after the other, since the whole is long.
        self.x, self.dy = (
            torch.randn(shape, generator=generator, device=device, dtype=rounded)
            .chunk(ranks)[rank]
            .to(dtype, copy=True)
            for _ in range(2)
        )
        self.x.requires_grad_()
        self.parameters = dict(self.mixer.named_parameters())

    def make_room(self, share: float) -> int:
        """For what L's heads retain of a rank's tokens, as the controller does after a step."""
        self.mixer.room = torch.tensor(room_for(share * self.own, self.mixer.lte.sink_size))
        return int(self.mixer.room)

    def run(self) -> tuple[Tensor, Mapping[str, Tensor], dict[str, Tensor | None]]:
        """Forward and backward: the output, what was counted, and the gradients of input and parameters."""
        y, aux, _ = self.mixer(self.x, self.context, None)
        counts = {} if aux is None else aux.counts
        if aux is not None and aux.loss is not None:
            y = attach_loss(y, aux.loss, 1.0)
        wanted = {"x": self.x} | self.parameters
        with torch.autograd.set_multithreading_enabled(False):
            grads = torch.autograd.grad(y, list(wanted.values()), self.dy, allow_unused=True)
        return y.detach(), counts, dict(zip(wanted, grads, strict=True))


def _context(lengths: Sequence[int], device: torch.device) -> Context:
    samples = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
    keys = dropout_keys(samples, torch.arange(len(samples), device=device), 7, 1, 1)
    return Context(Sequences.of(lengths, device), keys)


def alone(given: Given, variants: Sequence[str], sizes: Mapping[int, int]) -> dict[str, Any]:
    """By variant: errors of one process, and by size L's biases and time, of all processes at once without a word
    between them. A collective.

    Args:
        sizes: tokens over all context parallel ranks, and of the one process that each is compared with.
    """
    prepare_allocator()
    groups.initialize(given.config(variants[0], sum(given.judged), 1).parallel)
    rank, world = groups.world()
    found: dict[str, Any] = {}
    for number, variant in enumerate(variants):
        biases = {tokens: _bias(given, variant, tokens) for tokens in {*sizes, *sizes.values()}}
        biases[JUDGED] = _bias(given, variant, JUDGED)
        found[variant] = figures = {"biases": biases, "times": {}}
        if number % world == rank:
            figures["errors"] = _reference(given, variant, biases[JUDGED])
        for tokens in sizes.values():
            figures["times"][tokens] = _timed(given, variant, tokens, 1, False, biases[tokens])
    ranks = groups.gather(found)
    for number, variant in enumerate(variants):
        found[variant]["errors"] = ranks[number % world][variant]["errors"]
    return found


def together(
    given: Given, variants: Sequence[str], sizes: Mapping[int, int], one: Mapping[str, Any], progress: Path
) -> None:
    """A line in `progress` for each variant, way of context parallel ranks and size, one where a variant begins, and
    one where it has no way. A collective.

    Args:
        sizes: as for `alone`.
        one: what `alone` found on the first process.
    """
    ranks = int(os.environ["WORLD_SIZE"])
    prepare_allocator()
    groups.initialize(ParallelConfig(context=ranks))
    for variant in variants:
        _note(progress, {"begun": variant})
        try:
            config = given.config(variant, sum(given.judged), ranks)
        except UserError as error:
            _note(progress, {"mixer": variant, "gpus": ranks, "error": f"neither way is possible: {error}"})
            continue
        for way in _ways(config):
            for line in _lines(given, variant, sizes, one[variant], way):
                _note(progress, {"mixer": variant, "way": way, "gpus": ranks} | line)


def _ways(config: Config) -> list[str]:
    """What context parallel ranks can do with the mixer."""
    kind, model, ranks = KINDS[config.model.pattern], derived(config.model), config.parallel.context
    stays = kind.passed_on(model, ranks, _width(config)) is not None
    return [STAY] * stays + [EXCHANGE] * (kind.heads_fault(model, ranks) is None)


def _lines(
    given: Given, variant: str, sizes: Mapping[int, int], one: Mapping[str, Any], way: str
) -> Iterator[dict[str, Any]]:
    _, ranks = groups.context_parallel()
    kind, stays = KINDS[VARIANTS[variant][0]], way == STAY
    errors = _errors(given, variant, stays, one["biases"][JUDGED])
    judged = {"errors": told(errors), "errors_of_one": told(one["errors"])}
    if faults := off(errors, one["errors"], FLOOR[DTYPES[given.config(variant, sum(given.judged), ranks).train.dtype]]):
        yield judged | {"error": f"{', '.join(faults)} are off; it was not timed"}
        return
    for tokens, part in sizes.items():
        times = _timed(given, variant, tokens, ranks, stays, one["biases"][tokens])
        config = given.config(variant, tokens, ranks)
        model, of_one = derived(config.model), one["times"][part]
        work, work_of_one = (sum(kind.flops(model, length).values()) for length in (tokens, part))
        yield {
            "tokens": tokens,
            **times,
            "tokens_of_one": part,
            "ms_of_one": of_one["ms"],
            "efficiency": round(of_one["ms"] / times["ms"], 4),
            "flops_a_token": round(work / work_of_one, 3),
            "chosen": stays == kind.keeps_tokens(model, tokens // ranks, 1, ranks, _width(config)),
            **judged,
        }
        judged = {}


def off(errors: Errors, of_one: Errors, floor: float) -> list[str]:
    """The names of what is further from float64 than one process's result would explain."""
    return [name for name, error in errors.items() if not error <= WORSE * of_one[name] + floor]


def told(errors: Errors) -> dict[str, float | str]:
    """Of the weights the largest alone, or the first that is not finite; what is not as text, for which JSON has no
    number."""
    own = {name: errors[name] for name in ("y", "x")}
    weights = [error for name, error in errors.items() if name not in own]
    own["weights"] = next((error for error in weights if not math.isfinite(error)), max(weights, default=0.0))
    return {name: error if math.isfinite(error) else str(error) for name, error in own.items()}


def _bias(given: Given, variant: str, tokens: int) -> list[float]:
    """For L's heads, with which the wanted share of a sample of tokens has a positive score; [] for other mixers.

    tokens: of the document, or JUDGED, where half of them have.
    """
    if VARIANTS[variant][0] != "L":
        return []
    share = given.kept(variant, tokens)
    config = given.config(variant, min(tokens or sum(given.judged), 65536), 1)
    made = Pass(config, (config.train.seq_length,), DTYPES[config.train.dtype], [])
    router = made.mixer.router
    with torch.no_grad():
        _, k, v = made.mixer.project(made.x)
        parameters = router.parameters_for_op()
        dropout = made.mixer._dropout(made.context, k.shape[1])  # with which many more are far from the middle
        logits = retention_logits(k, v, parameters, made.context.sequences, dropout, router.dilation).float()
    last = max(1, min(len(logits) - 1, round((1 - share) * len(logits))))
    middle = logits.sort(0).values[last - 1 : last + 1].mean(0)  # between two, so that no rounding decides
    bias = (router.projection_bias.float() - middle).cpu()
    rounded = bias.to(router.projection_bias.dtype)  # downwards: at a small share the other side has many more
    return torch.where(rounded > bias, torch.nextafter(rounded, rounded.new_tensor(-torch.inf)), rounded).tolist()


def _reference(given: Given, variant: str, bias: list[float]) -> Errors:
    """Leave what float64 gives in the folder; how far one process is from it in the type that is measured."""
    config = given.config(variant, sum(given.judged), 1)
    y, _, grads = Pass(config, given.judged, torch.float64, bias).run()
    exact = {"y": y} | grads
    torch.save({name: x if x is None else x.cpu() for name, x in exact.items()}, given.folder / f"{variant}.pt")
    y, _, grads = Pass(config, given.judged, DTYPES[config.train.dtype], bias).run()
    return compared({"y": y} | grads, exact)


def _errors(given: Given, variant: str, stays: bool, bias: list[float]) -> Errors:
    """Likewise of context parallel ranks, on all of them."""
    config = given.config(variant, sum(given.judged), groups.context_parallel()[1])
    made = Pass(config, given.judged, DTYPES[config.train.dtype], bias, given.kept(variant, JUDGED) if stays else None)
    y, _, grads = made.run()
    found = {"y": gather_tokens(y), "x": gather_tokens(grads.pop("x"))}
    for name, grad in grads.items():
        total = torch.zeros_like(made.parameters[name], dtype=torch.float32) if grad is None else grad.float()
        dist.all_reduce(total)
        found[name] = total
    if not groups.is_main():
        return groups.broadcast(None)
    exact = torch.load(given.folder / f"{variant}.pt", map_location=groups.device())
    return groups.broadcast(compared(found, exact))


def compared(found: Mapping[str, Tensor | None], exact: Mapping[str, Tensor | None]) -> Errors:
    """Norm of the difference by the norm; where the exact one is zero or there is none, norm of what was found. Where
    nothing was found but something should, infinity."""
    errors = {}
    for name, y in exact.items():
        norm = 0.0 if y is None else float(y.norm())
        if (x := found[name]) is None:
            error = math.inf if norm else 0.0
        elif norm:
            error = float((x.double() - y).norm()) / norm
        else:
            error = float(x.double().norm())
        errors[name] = round(error, 6)
    return errors


def _timed(given: Given, variant: str, tokens: int, ranks: int, stays: bool, bias: Sequence[float]) -> dict[str, Any]:
    """Median ms of forward and backward, of the slowest process each time."""
    config = given.config(variant, tokens, ranks)
    made = Pass(config, (tokens,), DTYPES[config.train.dtype], bias, given.kept(variant, tokens) if stays else None)
    before, elapsed, room = _peak(reset=True), 0.0, None
    for _ in range(2):
        began = time.perf_counter()
        counts = made.run()[1]
        _synchronize()
        elapsed = time.perf_counter() - began
        shares = _shares(counts, config.model.attention.num_kv_heads)
        if stays and variant == "L":
            short = "missing" in counts and bool(gather_tokens(counts["missing"]).any())
            room = made.make_room(max(shares))
    found: dict[str, Any] = {"peak_gib": round((_peak() - before) / 2**30, 2)} if torch.cuda.is_available() else {}
    if shares:
        found["kept"] = round(statistics.mean(shares), 5)
    if room is not None:
        found["room"] = room
        if short:
            found["error"] = "a rank retained more than there was room for"
        elif room > most_room(config.model.lte):
            found["error"] = "a head keeps more than a run makes room for"
    repeats = 9 if groups.max_over_all(round(1e3 * elapsed)) < 150 else 3
    times = [_milliseconds(made.run) for _ in range(repeats)]
    slowest = [max(each) for each in zip(*groups.gather(times), strict=True)]
    del made
    _release()
    return {"ms": round(statistics.median(slowest), 3), "repeats": repeats} | found


def _shares(counts: Mapping[str, Tensor], heads: int) -> list[float]:
    """Of the tokens that count, those that each of L's heads keeps, over all ranks; [] of other mixers."""
    if "kept" not in counts:
        return []
    kept = gather_tokens(counts["kept"])  # of ranks that keep their tokens, a part of every head's
    return (kept.view(-1, heads).sum(0) / counts["positions"]).tolist()


def _milliseconds(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    torch.cuda._sleep(60_000_000)  # cycles: some 30 ms
    dist.all_reduce(torch.zeros(1, device=groups.device()))  # all ranks begin at once
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _width(config: Config) -> int:
    return DTYPES[config.train.dtype].itemsize


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak(reset: bool = False) -> int:
    if not torch.cuda.is_available():
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _note(progress: Path, line: dict[str, Any]) -> None:
    if groups.is_main():
        with open(progress, "a") as file:
            file.write(json.dumps(line) + "\n")
