"""How the gated delta rule's kernels are launched, and how a packing is cut into chunks and segments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megahybrid_kernels.integers import cdiv, next_power_of_2, tile_width
from megahybrid_kernels.sequences import Sequences
from megahybrid_kernels.targets import AMPERE, BLACKWELL, CDNA3, HOPPER, table_of
from megahybrid_kernels.tuning import Launch


@dataclass(frozen=True)
class Tuning:
    """Launches of all kernels, and what is cut.

    Attributes:
        prepare, scan, states, reverse, gradient, join: the launches, their size columns of the values (in `prepare` of
            the keys); `states` is the scan that has no outputs.
        chunk: tokens of a chunk.
        programs: a scan is cut into segments until about so many programs run; sequences alone suffice from half of it.
        shortest: chunks of a segment at least.
        whole: chunks up to which no sequence is cut where no gradient is asked for: the host is reckoned to take longer
            for three launches more than a GPU gains (not measured).
    """

    prepare: Launch
    scan: Launch
    states: Launch
    reverse: Launch
    gradient: Launch
    join: Launch
    chunk: int = 64
    programs: int = 128
    shortest: int = 16
    whole: int = 64


# Of half precision, by table: of heads up to 128 wide, and of wider ones.
_HALF = {
    HOPPER: (
        # Two scans that run at once fit a multiprocessor.
        Tuning(
            Launch(64, 4, 1, 128), Launch(64, 4, 3), Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 3),
            Launch(16, 4, 2),
        ),
        Tuning(
            Launch(64, 4, 1, 128), Launch(128, 8, 2), Launch(128, 8, 2), Launch(128, 8, 2), Launch(64, 8, 4),
            Launch(16, 4, 2),
        ),
    ),
    # Half and a quarter of the columns: the state is in registers, and so are both operands of its products.
    AMPERE: (
        Tuning(
            Launch(32, 4, 1), Launch(32, 4, 2), Launch(32, 4, 2), Launch(32, 4, 2), Launch(32, 4, 3), Launch(16, 4, 2)
        ),
        Tuning(
            Launch(32, 4, 1), Launch(32, 8, 1), Launch(32, 8, 2), Launch(32, 8, 1), Launch(64, 8, 2), Launch(16, 4, 2)
        ),
    ),
    CDNA3: (
        Tuning(
            Launch(32, 4, 1), Launch(32, 4, 1), Launch(32, 4, 1), Launch(16, 4, 1), Launch(32, 4, 1), Launch(16, 4, 1)
        ),
        Tuning(
            Launch(32, 4, 1), Launch(16, 4, 1), Launch(16, 4, 1), Launch(16, 4, 1), Launch(16, 4, 1), Launch(16, 4, 1)
        ),
    ),
}  # fmt: skip
# A scan of more columns takes more tensor memory than there is.
_HALF[BLACKWELL] = _HALF[AMPERE]


def tuning(width: int, dtype: torch.dtype, device: torch.device) -> Tuning:
    """Fixed by the wider head dim, the dtype and the kind of GPU, so that all ranks and lengths run the same code."""
    if dtype != torch.float32:
        return _HALF[table_of(device)][width > 128]
    # Every product is three of tf32, whose operands are kept in two parts each.
    # For sm_100 Triton 3.8 gives a scan 32 registers without a cap.
    cap = 255 if table_of(device) is BLACKWELL else None
    scan, chunk = (Launch(16, 4, 1, cap), 32) if width > 128 else (Launch(32, 4, 1, cap), 64)
    # Four warps: Triton gives eight the rows of a tile twice as high, and their products read what is not there.
    gradient = Launch(16, 4, 1)
    return Tuning(Launch(32, 4, 1), scan, scan, scan, gradient, Launch(16, 4, 1), chunk)


@dataclass(frozen=True)
class Plan:
    """How a packing is cut, as int32 tensors on the device.

    Attributes:
        chunks: `[chunks, 2]`, first row and the row after the last.
        segments: `[segments, 3]`, the same of a segment, and its first chunk.
        bounds: `[sequences + 1]`, each sequence's first segment; None where nothing is joined, since segments are
            sequences.
        last: segments of the last sequence.
    """

    chunks: Tensor
    segments: Tensor
    bounds: Tensor | None
    last: int


def _pieces(begins: Tensor, lengths: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """First rows and rows after the last of pieces of at most `size` rows, and `[n + 1]` the first piece of each."""
    counts = (lengths + size - 1) // size
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    owner = torch.repeat_interleave(counts)
    starts = begins[owner] + (torch.arange(len(owner)) - first[owner]) * size
    return starts, torch.minimum(starts + size, (begins + lengths)[owner]), first


@lru_cache(maxsize=16)
def plan(lengths: tuple[int, ...], chunk: int, longest: int, device: torch.device, joined: bool = False) -> Plan:
    """The plan with segments of at most `longest` chunks, made on the host once for all layers that share a packing.

    joined: in any case, as the maps of sequences have to be known.
    """
    # Out of inference mode, because a plan first made during evaluation is saved for backward by later training.
    with torch.inference_mode(False):
        length = torch.tensor(lengths)
        begin = length.cumsum(0) - length
        starts, stops, first = _pieces(begin, length, chunk)
        chunks, segments, bounds, last = torch.stack([starts, stops], 1), [begin, begin + length, first[:-1]], None, 1
        if joined or max(lengths) > longest * chunk:
            starts, stops, bounds = _pieces(begin, length, longest * chunk)
            counts = bounds.diff()
            owner, last = torch.repeat_interleave(counts), int(counts[-1])
            segments = [starts, stops, first[owner] + (starts - begin[owner]) // chunk]
        tensors = (chunks, torch.stack(segments, 1), bounds)
        moved = (x if x is None else x.to(torch.int32).to(device, non_blocking=True) for x in tensors)
        return Plan(*moved, last)


def plan_of(sequences: Sequences, chunk: int, longest: int, device: torch.device, joined: bool) -> Plan:
    """`plan` of these sequences, for `Sequences.once`: kept as long as they are, as a CUDA graph needs it."""
    return plan(sequences.lengths, chunk, longest, device, joined)


@lru_cache(maxsize=64)
def rows_between(first: int, end: int, device: torch.device) -> Tensor:
    """Bounds of one sequence whose segments are rows of their own."""
    with torch.inference_mode(False):
        return torch.tensor([first, end], dtype=torch.int32, device=device)


def longest_segment(lengths: tuple[int, ...], heads: int, value_dim: int, tune: Tuning, training: bool) -> int:
    """Chunks of a segment: a power of two, so that few plans differ. training: whether there will be gradients."""
    # Programs that one sequence gives.
    columns_programs = heads * cdiv(value_dim, min(tune.scan.size, tile_width(value_dim)))
    chunks = [cdiv(length, tune.chunk) for length in lengths]
    most = max(chunks)
    longest = next_power_of_2(most)
    if most <= tune.whole and not training:
        return longest
    # The scan takes as long as its longest sequence: short ones beside it do not help.
    if 2 * len([1 for x in chunks if 2 * x >= most]) * columns_programs >= tune.programs:
        return longest
    return min(longest, max(tune.shortest, next_power_of_2(sum(chunks) * columns_programs // tune.programs)))
