"""The shapes of all ops."""

from megahybrid_kernels.attention.cases import Attention
from megahybrid_kernels.causal_conv1d.cases import CausalConv1d
from megahybrid_kernels.counter_dropout.cases import DropoutKeys
from megahybrid_kernels.exit_positions.cases import ExitPositions
from megahybrid_kernels.gated_delta_rule.cases import GatedDeltaRule
from megahybrid_kernels.gemv.cases import GatedRowProduct, RowProducts
from megahybrid_kernels.judging.case import Shape
from megahybrid_kernels.linear_cross_entropy.cases import LinearCrossEntropy
from megahybrid_kernels.lte_attention.cases import LTEAttention
from megahybrid_kernels.native_sparse_attention.cases import NativeSparseAttention
from megahybrid_kernels.norm.cases import GatedRMSNorm, RMSNorm
from megahybrid_kernels.retention_router.cases import RetentionRouter
from megahybrid_kernels.rotary.cases import Rotary
from megahybrid_kernels.swiglu.cases import SwiGLU

__all__ = [
    "Attention",
    "CausalConv1d",
    "DropoutKeys",
    "ExitPositions",
    "GatedDeltaRule",
    "GatedRMSNorm",
    "GatedRowProduct",
    "LTEAttention",
    "LinearCrossEntropy",
    "NativeSparseAttention",
    "RMSNorm",
    "RetentionRouter",
    "Rotary",
    "RowProducts",
    "Shape",
    "SwiGLU",
]
