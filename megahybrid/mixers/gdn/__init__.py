"""Gated DeltaNet (Yang et al., arXiv 2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megahybrid.key import key
from megahybrid.mixers.counting import linear
from megahybrid.mixers.kind import Activations, Kind, MicroBatch

if TYPE_CHECKING:
    from megahybrid.config.schema import ModelConfig
    from megahybrid.model.mixer import Mixer
    from megahybrid_kernels.judging.case import Shape

CHUNK = 64
"""Tokens a chunk of the gated delta rule as GPU kernels choose it."""


@dataclass
class GDNConfig:
    """Gated DeltaNet (pattern letter G)."""

    num_heads: int = key(8)
    """Heads of queries, keys and values."""
    head_dim: int = key(128)
    """Channels of a query or key head."""
    value_head_dim: int | None = key(None, otherwise=lambda gdn: gdn.head_dim)
    """Channels of a value head; head_dim when left out."""
    conv_size: int = key(4)
    """Taps of the causal short convolution on q, k and v."""


class GDNKind(Kind):
    """Gated DeltaNet."""

    letter = "G"
    title = "Gated DeltaNet"
    utilisation = 0.386, 0.494
    launches = 61
    sections: ClassVar = {"gdn": GDNConfig}

    def split(self, model: ModelConfig) -> dict[str, int]:
        return {"model.gdn.num_heads": model.gdn.num_heads}

    def exchanged(self, model: ModelConfig) -> int:
        gdn = model.gdn
        return gdn.num_heads * 2 * (gdn.head_dim + gdn.value_head_dim + 1)

    def passed_on(self, model: ModelConfig, ranks: int, width: int) -> float:
        """Of every other rank a map of a head's memory, Dk (Dk + Dv) numbers of 4 bytes, and of the one before the last
        rows that the short convolutions see."""
        gdn = model.gdn
        map_size = gdn.head_dim * (gdn.head_dim + gdn.value_head_dim)
        rows = (gdn.conv_size - 1) * (2 * gdn.head_dim + gdn.value_head_dim)
        return gdn.num_heads * (4 * (ranks - 1) * map_size + width * rows)

    def flops(self, model: ModelConfig, length: int) -> dict[str, float]:
        """Projections of q, k, v, gate, output and the two scalars a head; `taps` products a channel of q, k and v; and
        the delta rule."""
        gdn = model.gdn
        keys, values = gdn.num_heads * gdn.head_dim, gdn.num_heads * gdn.value_head_dim
        return {
            "projections": linear(model.hidden_size, 2 * keys + 3 * values + 2 * gdn.num_heads),
            "short convolution": 2 * gdn.conv_size * (2 * keys + values),
            "delta rule": gdn.num_heads * delta_rule(gdn.head_dim, gdn.value_head_dim, min(CHUNK, length)),
        }

    def activations(self, model: ModelConfig, batch: MicroBatch) -> Activations:
        """As `gated_delta_rule.triton` computes it, with chunks of C tokens; w bytes an activation, K and V widths of a
        rank's keys and values, Dk and Dv of a head's.

        - q, k and v before and after the short convolution, 2 w (2 K + V); o, gate and their normed product, 3 w V;
        - a and b, 2 w a head; nine scalings of rows, 36 a head; two matrices `[C, C]` a head and chunk, in bf16 three,
          w C a head each;
        - where sequences are cut into segments of S tokens, or a sequence into the rows of context parallel ranks, the
          state before each and how it passes through, 4 K (Dk + Dv) / S, and of every row this, 4 K Dk.

        A document's last chunk counts in full, however short: where documents are shorter than a chunk, all of chunks
        is as many times larger, which the shapes do not tell. No state after a document is kept. A context parallel
        rank's document is a segment, however short: what passes through segments is as many times larger, too, where
        documents are shorter than S (with heads of 256 and documents of 128 tokens the op keeps 2.7 times this).

        Backward: o's gradient, the writes u and their gradient, v's, 4 w V; those of q and k, 2 w K; and the state
        before each chunk and its gradient, 2 w K Dv / C.
        """
        import torch

        from megahybrid_kernels.gated_delta_rule.triton_plan import longest_segment, tuning
        from megahybrid_kernels.gated_delta_rule.triton_prepare import ROW_KINDS

        width, key_dim, value_dim = batch.width, model.gdn.head_dim, model.gdn.value_head_dim
        heads = model.gdn.num_heads // batch.ranks
        keys, values = heads * key_dim, heads * value_dim
        dtype = torch.bfloat16 if width == 2 else torch.float32
        tune = tuning(max(key_dim, value_dim), dtype, torch.device("cpu"))
        segment = tune.chunk * longest_segment((batch.length,) * batch.samples, heads, value_dim, tune, True)
        a_head = 2 * width + 4 * ROW_KINDS.value + (3 if width == 2 else 2) * width * tune.chunk
        saved = width * (4 * keys + 5 * values) + heads * a_head
        if segment < batch.length or batch.rows > 1:
            saved += 4 * keys * (key_dim + value_dim) / min(segment, batch.length)
        if batch.rows > 1:
            saved += 4 * keys * key_dim * batch.rows / (batch.samples * batch.length)
        chunk = min(tune.chunk, batch.length)
        return Activations(saved, width * (4 * values + 2 * keys + 2 * keys * value_dim / chunk))

    def judged(self, model: ModelConfig, ranks: int) -> list[Shape]:
        from megahybrid.parallel.joined import rows_of_whole
        from megahybrid_kernels.judging import shapes

        heads, key_dim, value_dim = model.gdn.num_heads // ranks, model.gdn.head_dim, model.gdn.value_head_dim
        taps, convolutions = model.gdn.conv_size, [shapes.CausalConv1d(heads * key_dim, model.gdn.conv_size)]
        if value_dim != key_dim:
            convolutions += [shapes.CausalConv1d(heads * value_dim, taps, "values")]
        # Inference has one of all of them, where weights are joined of a part of the product that they and gate, a and
        # b come from.
        channels, whole = heads * (2 * key_dim + value_dim), rows_of_whole(heads * (2 * key_dim + 2 * value_dim + 2))
        convolutions += [shapes.CausalConv1d(channels, taps, *each) for each in (("together",), ("joined", whole))]
        rule, norm = shapes.GatedDeltaRule(heads, key_dim, value_dim), shapes.GatedRMSNorm(heads, value_dim)
        return [rule, *convolutions, norm, shapes.GatedRowProduct(model.hidden_size, heads, value_dim)]

    def module(self) -> type[Mixer]:
        from megahybrid.mixers.gdn.module import GatedDeltaNet

        return GatedDeltaNet

    def exported(self) -> type:
        from megahybrid.mixers.gdn.hf import GatedDeltaNet

        return GatedDeltaNet


def delta_rule(key_dim: int, value_dim: int, chunk: int) -> float:
    """FLOPs of the gated delta rule of a token and head, in chunks of C tokens (the paper's section 3.3).

    With the state S `[Dk, Dv]`, three products of 2 Dk Dv each: S^T k (what is stored under the key), S^T q, and the
    write k u^T. Inside the chunk the i-th of C tokens meets i - 1 before it, and itself as a query:
        k_i . k_j  and the forward substitution for u_i:  2 (i - 1) (Dk + Dv)
        q_i . k_j  and the sum over u_j:                  2 i (Dk + Dv)
    which is on average 2 C (Dk + Dv). In all
        6 Dk Dv + 2 C (Dk + Dv).
    C = 1 is the recurrence itself, 6 Dk Dv and a rest: at Dk = Dv = 128 chunks of 64 compute a third more than that, at
    256 a sixth, which is the price of matrix products.
    """
    return 6 * key_dim * value_dim + 2 * chunk * (key_dim + value_dim)
