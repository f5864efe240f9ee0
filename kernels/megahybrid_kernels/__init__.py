"""Ops of hybrid linear + sparse attention models over packed sequences, in PyTorch and Triton.

Each op lives in a folder of its own, mostly named as the op is: as attributes of this package such names are the ops,
`from megahybrid_kernels.attention import …` reaches into the folder. Triton is imported when a kernel first runs.
"""

from megahybrid_kernels.attention import GrowingCache, KeyValueCache, attention, attention_with_cache
from megahybrid_kernels.causal_conv1d import causal_conv1d
from megahybrid_kernels.counter_dropout import dropout_keys, fold
from megahybrid_kernels.exit_positions import NEVER, exit_positions
from megahybrid_kernels.gated_delta_rule import gated_delta_rule
from megahybrid_kernels.gemv import add_rms_norm_gemv, gated_rms_norm_gemv, swiglu_gemv
from megahybrid_kernels.linear_cross_entropy import IGNORED, linear_cross_entropy
from megahybrid_kernels.lte_attention import LTECache, lte_attention, lte_attention_with_cache
from megahybrid_kernels.native_sparse_attention import (
    NSACache,
    native_sparse_attention,
    native_sparse_attention_with_cache,
    select_blocks,
)
from megahybrid_kernels.norm import add_rms_norm, gated_rms_norm, rms_norm
from megahybrid_kernels.retention_router import (
    Dropout,
    RouterParameters,
    RouterState,
    margin,
    retention_logits,
    retention_scores,
    retention_scores_streamed,
)
from megahybrid_kernels.rotary import rotary, rotary_of_both
from megahybrid_kernels.sequences import Sequences
from megahybrid_kernels.swiglu import swiglu

__all__ = [
    "IGNORED",
    "NEVER",
    "Dropout",
    "GrowingCache",
    "KeyValueCache",
    "LTECache",
    "NSACache",
    "RouterParameters",
    "RouterState",
    "Sequences",
    "add_rms_norm",
    "add_rms_norm_gemv",
    "attention",
    "attention_with_cache",
    "causal_conv1d",
    "dropout_keys",
    "exit_positions",
    "fold",
    "gated_delta_rule",
    "gated_rms_norm",
    "gated_rms_norm_gemv",
    "linear_cross_entropy",
    "lte_attention",
    "lte_attention_with_cache",
    "margin",
    "native_sparse_attention",
    "native_sparse_attention_with_cache",
    "retention_logits",
    "retention_scores",
    "retention_scores_streamed",
    "rms_norm",
    "rotary",
    "rotary_of_both",
    "select_blocks",
    "swiglu",
    "swiglu_gemv",
]
