"""GPU hours of a recipe on one GPU: of its start and its steps, without validations, probes and saves.

Several GPUs take as many hours together but for the start, and what their layout costs (docs/performance/layouts.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from megahybrid.config.branching import branch_point
from megahybrid.config.pattern import parse_pattern
from megahybrid.config.recording import replayed
from megahybrid.config.schema import Config
from megahybrid.devices import PEAKS
from megahybrid.key import derived
from megahybrid.mixers import KINDS
from megahybrid.model.settings import Settings
from megahybrid.scaling.flops import flops_per_token, layer

# What kinds say of their utilisation is from docs/performance/whole-step.md, for models of 24 layers in bf16 with
# samples of 4,096 tokens. A launch: what steps that were bound by the host took by all their launches, 50 to 108 µs on
# five hosts at different times, 80 in the middle (small-runs.md). A step's launches beside its layers are what
# tests/training/test_launches.py counts. Exchanges of context ranks: lalte-0.4b with 65,536 tokens on four, 399 ms a
# step (context.md), less what its launches take. Replayed: the engine's step of recall as a CUDA graph takes 4.6 ms, of
# which kernels take 3.1; its data are made meanwhile. A start: runs of a minute took 2.3 to 10.6 s beside their
# steps, the most where kernels are compiled.
_WIDTHS = 1024, 2048
_LEAST_MFU = 0.05
_LAUNCH_SECONDS = 80e-6
_LAUNCHES = 62
_EXCHANGES_SECONDS = 0.0112
_REPLAYED_SECONDS = 0.0015
_START_SECONDS = 4.0


@dataclass(frozen=True)
class Estimate:
    """What a recipe takes on one GPU.

    Attributes:
        gpu: the kind of GPU.
        step_seconds: seconds a step.
        steps: that the run trains itself, without its trunk's where it is a branch.
        source: where that is from, as the end of a sentence.
    """

    gpu: str
    step_seconds: float
    steps: int
    source: str

    @property
    def hours(self) -> float:
        """GPU hours of a start and all steps."""
        return (_START_SECONDS + self.steps * self.step_seconds) / 3600

    def __str__(self) -> str:
        return f"GPU hours on one {self.gpu}: {self.hours:,.3g}, {self.step_seconds:.3g} s a step (from {self.source})"


def own_steps(config: Config) -> int:
    """Steps that a run trains itself: all, or a branch's after its trunk's."""
    point = branch_point(config.train)
    return config.train.steps - (point[1] if point else 0)


def by_utilisation(
    config: Config, mfu: float, source: str, gpu: str = "H100", lengths: Mapping[int, float] | None = None
) -> Estimate:
    """From a model FLOP utilisation, on a GPU that megahybrid/devices.py knows, `H100` say; `lengths` as in
    `flops_per_token`."""
    train = config.train
    flops = flops_per_token(config, lengths).training * train.global_batch_size * train.seq_length
    return Estimate(gpu, flops / (PEAKS[gpu] * mfu), own_steps(config), f"{100 * mfu:.1f} % MFU, {source}")


def tabled(config: Config, gpu: str = "H100", lengths: Mapping[int, float] | None = None) -> Estimate:
    """From what was measured of other recipes, for one that nobody has run: the longer of the time that the FLOPs, of
    documents of these `lengths`, take at the tabled MFU, and of the launches."""
    found, train = _by_flops(config, gpu, lengths), config.train
    letters, count = parse_pattern(config.model.pattern).letters, train.global_batch_size / train.micro_batch_size
    seconds = with_host(config, config.parallel.replica, found.step_seconds, letters, count)
    if replayed(config, config.parallel.replica):
        source = f"a CUDA graph's kernels, guessed, and {1e3 * _REPLAYED_SECONDS:g} ms; --probe measures"
    elif seconds > found.step_seconds:
        source = "launches, by a table that hosts differ from; --probe measures"
    else:
        return found
    return replace(found, step_seconds=seconds, source=source)


def kernel_seconds(config: Config) -> float:
    """Seconds of a step's kernels on one H100, by the table."""
    return _by_flops(config, "H100", None).step_seconds


def _by_flops(config: Config, gpu: str, lengths: Mapping[int, float] | None) -> Estimate:
    """MFU is linear in the logarithm of the width, also below the table's, which is a guess, and not in another
    precision or at other lengths, where long full attention is slower. Layers that recompute their activations take
    their forward pass twice.
    """
    model = derived(config.model)
    letters = parse_pattern(model.pattern).letters
    mfu = utilisation(model.hidden_size, letters)
    mfu /= 1 + _recomputed(config, lengths) / 3
    guessed = ", a guess here" if model.hidden_size < _WIDTHS[0] else ""
    return by_utilisation(config, mfu, f"by docs/performance/whole-step.md{guessed}", gpu, lengths)


def utilisation(width: int, letters: str) -> float:
    """MFU of layers of these kinds in training, by the table."""
    at_low, at_high = map(fmean, zip(*(KINDS[each].utilisation for each in letters), strict=True))
    low, high = _WIDTHS
    slope = (at_high - at_low) / math.log(high / low)
    return min(at_high, max(_LEAST_MFU, at_low + slope * math.log(width / low)))


def _recomputed(config: Config, lengths: Mapping[int, float] | None) -> float:
    """Part of the forward pass's FLOPs that is computed twice."""
    settings = Settings.of(config)
    again = [each for each in settings.pattern.letters if each in settings.recompute]
    twice = sum(
        part * sum(layer(settings.model, letter, length).values())
        for letter in again
        for length, part in (lengths or {config.train.seq_length: 1}).items()
    )
    return twice / flops_per_token(config, lengths).forward


def with_host(config: Config, processes: int, kernels: float, letters: str, micro_batches: float) -> float:
    """Seconds of a step whose kernels take so many of a process, which has layers of these kinds: the launches', where
    these take longer, or with what the host takes beside a CUDA graph."""
    if replayed(config, processes):
        return kernels + _REPLAYED_SECONDS
    exchanges = _EXCHANGES_SECONDS if config.parallel.context > 1 else 0.0
    layers = sum(KINDS[letter].launches * _LAUNCH_SECONDS + exchanges for letter in letters)
    return max(kernels, _LAUNCHES * _LAUNCH_SECONDS + layers * micro_batches)
