"""Token mixers: `mixer(x, context, state=None) → (y, aux, state)`, pure and packed."""

from megahybrid.model.mixers.attention import FullAttention, SlidingWindowAttention
from megahybrid.model.mixers.gdn import GatedDeltaNet
from megahybrid.model.mixers.lte import LTEAttention

MIXERS = {"G": GatedDeltaNet, "L": LTEAttention, "S": SlidingWindowAttention, "F": FullAttention}

__all__ = ["MIXERS", "FullAttention", "GatedDeltaNet", "LTEAttention", "SlidingWindowAttention"]
