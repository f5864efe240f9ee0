"""Token mixers: `mixer(x, context, state=None) → (y, aux, state)`, pure and packed.

`Mixer.fallbacks(model configuration, dtype)` yields the ops whose kernels do not take that on a GPU.
"""

from megahybrid.model.mixers.attention import FullAttention, SlidingWindowAttention
from megahybrid.model.mixers.gdn import GatedDeltaNet
from megahybrid.model.mixers.lte import LTEAttention

MIXERS = {"G": GatedDeltaNet, "L": LTEAttention, "S": SlidingWindowAttention, "F": FullAttention}

__all__ = ["MIXERS", "FullAttention", "GatedDeltaNet", "LTEAttention", "SlidingWindowAttention"]
