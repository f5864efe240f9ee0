"""GPU hours of a recipe on one GPU: of its steps alone, without start, validations, probes and saves.

Several GPUs take as many hours together, and what their layout costs (docs/performance/layouts.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from megahybrid.config.batch import replayed
from megahybrid.config.branching import branch_point
from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import Config
from megahybrid.devices import PEAKS
from megahybrid.key import derived
from megahybrid.mixers import KINDS
from megahybrid.model.settings import Settings
from megahybrid.scaling.flops import flops_per_token, layer

# What kinds say of their utilisation and their launches is from docs/performance: whole-step.md for models of 24 layers
# in bf16 with samples of 4,096 tokens. Launches: 53 µs each, as a step of recipes/recall.yaml took 16.2 ms for 308 on
# the fastest of three hosts, up to 24.9 on others (small-runs.md); a layer has as many as
# tests/training/test_launches.py counts, and a step 62 beside its layers, and 2.4 ms for its data. Exchanges of context
# ranks: lalte-0.4b with 65,536 tokens on four, 399 ms a step (context.md), less what its launches take. Replayed: a
# step of recall as a CUDA graph takes 5.6 ms, of which kernels take 3.1.
_WIDTHS = 1024, 2048
_LEAST_MFU = 0.05
_STEP_SECONDS = 0.0057
_REPLAYED_SECONDS = 0.0025
_EXCHANGES_SECONDS = 0.0131


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
        """GPU hours of all steps."""
        return self.steps * self.step_seconds / 3600

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
    by_flops, train = _by_flops(config, gpu, lengths), config.train
    if replayed(config, config.parallel.replica):
        seconds = by_flops.step_seconds + _REPLAYED_SECONDS
        return Estimate(gpu, seconds, by_flops.steps, "a guess at a CUDA graph's kernels, and 2.5 ms; --probe measures")
    letters = parse_pattern(config.model.pattern).letters
    launches = launch_seconds(letters, train.global_batch_size / train.micro_batch_size)
    if launches < by_flops.step_seconds:
        return by_flops
    return Estimate(gpu, launches, by_flops.steps, "the host's launches, roughly by a table; --probe measures")


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


def launch_seconds(letters: str, micro_batches: float, context: int = 1) -> float:
    """Seconds a step in which the host launches the passes of layers of these kinds, over so many context ranks."""
    exchanges = _EXCHANGES_SECONDS if context > 1 else 0.0
    return _STEP_SECONDS + sum(KINDS[letter].host_seconds + exchanges for letter in letters) * micro_batches
