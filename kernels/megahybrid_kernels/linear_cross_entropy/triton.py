"""What becomes of a chunk's logits, in Triton: a program a row.

Statistics take one pass along the row, the gradient another. Without ranks to ask in between one launch does both: a
row of 128k logits in bf16 is 256 KiB, so that most of what is read again comes from the L2 cache.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from megahybrid_kernels.integers import next_power_of_2
from megahybrid_kernels.launch import kernel

# Logits of a step along the row, warps of a program, and steps whose loads are on their way.
_BLOCK, _WARPS, _STAGES = 8192, 16, 3


@kernel
def cross_entropy_kernel(
    logits, labels, weights, peaks, totals, targets, normalisers, z_loss, vocabulary,
    STATISTICS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row of logits: with STATISTICS its peak, sum and target, with GRADIENT its loss's gradient in its place.

    A label outside of the vocabulary is another rank's, or of weight 0.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    lane = tl.arange(0, BLOCK)
    if STATISTICS:
        target = tl.load(logits + label, mask=(label >= 0) & (label < vocabulary), other=0).to(tl.float32)
        peak = tl.load(logits).to(tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            place = first + lane
            value = tl.load(logits + place, mask=place < vocabulary, other=-float("inf")).to(tl.float32)
            new_peak = tl.maximum(peak, tl.max(value, 0))
            sums = sums * tl.exp(peak - new_peak) + tl.exp(value - new_peak)
            peak = new_peak
        total = tl.sum(sums, 0)
        tl.store(targets + row, target)
        if GRADIENT:
            normaliser = peak + tl.log(total)
            tl.store(normalisers + row, normaliser)
        else:
            tl.store(peaks + row, peak)
            tl.store(totals + row, total)
    else:
        normaliser = tl.load(normalisers + row)
    if GRADIENT:
        weight = tl.load(weights + row)
        factor = weight * (1 + 2 * z_loss * normaliser)
        for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            place = first + lane
            value = tl.load(logits + place, mask=place < vocabulary, other=0).to(tl.float32)
            slope = tl.exp(value - normaliser) * factor
            slope = tl.where(place == label, slope - weight, slope)
            tl.store(logits + place, slope.to(logits.dtype.element_ty), mask=place < vocabulary)


def _launch(
    logits: Tensor, labels: Tensor, weights: Tensor | None, z_loss: float, outputs: dict[str, Tensor], **flags: bool
) -> None:
    """`outputs` by the kernel's argument names; those left out are not used, nor are weights without a gradient."""
    unused = next(iter(outputs.values()))
    arrays = [outputs.get(name, unused) for name in ("peaks", "totals", "targets", "normalisers")]
    block = min(_BLOCK, next_power_of_2(logits.shape[1]))
    cross_entropy_kernel[len(logits)](
        logits, labels, unused if weights is None else weights, *arrays, z_loss, logits.shape[1], **flags,
        BLOCK=block, STAGES=_STAGES, num_warps=max(1, _WARPS * block // _BLOCK),
    )  # fmt: skip


def _empty(logits: Tensor, *names: str) -> dict[str, Tensor]:
    return {name: torch.empty(len(logits), dtype=torch.float32, device=logits.device) for name in names}


def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the PyTorch path's."""
    outputs = _empty(logits, "peaks", "totals", "targets")
    _launch(logits, labels, None, 0.0, outputs, STATISTICS=True, GRADIENT=False)
    return tuple(outputs.values())


def gradient_(logits: Tensor, labels: Tensor, weights: Tensor, normaliser: Tensor, z_loss: float) -> None:
    """As the PyTorch path's."""
    _launch(logits, labels, weights, z_loss, {"normalisers": normaliser}, STATISTICS=False, GRADIENT=True)


def statistics_and_gradient_(
    logits: Tensor, labels: Tensor, weights: Tensor, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """As the PyTorch path's."""
    if not gradient:
        peak, total, target = statistics(logits, labels)
        return peak + total.log(), target
    outputs = _empty(logits, "normalisers", "targets")
    _launch(logits, labels, weights, z_loss, outputs, STATISTICS=True, GRADIENT=True)
    return outputs["normalisers"], outputs["targets"]
