"""The angles of rotary embedding in fixed point: turns modulo 1, in units of 2^-64.

In floating point the product of a position and a frequency loses what the position gains: in float32 an angle at
524,288 is off by up to 2^-6. As integers modulo 2^64 the product is exact, however far the position, and loses whole
turns alone, which no sine sees. What is left is the frequency's own rounding, at most 2^-65 turns a position (5e-13
turns at 2^24), and that of the angle, once reduced to half a turn, to the dtype it is used in (4e-7 in float32).
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import lru_cache

import torch
from torch import Tensor

_TWO_PI = Decimal("6.283185307179586476925286766559005768394338798750")
RADIANS = float(_TWO_PI / 2**64)
"""Of one unit of a phase."""


@lru_cache
def frequencies(half: int, theta: float, device: torch.device) -> Tensor:
    """int64 `[half]`: phases of position 1, theta^(-i / half) / (2 pi); a position's are its products with them, which
    wrap around into `[-2^63, 2^63)`, half a turn to either side."""
    with localcontext() as context:
        context.prec = 50
        turns = [Decimal(theta) ** (-Decimal(i) / half) / _TWO_PI for i in range(half)]
        units = [int((each * 2**64).to_integral_value()) for each in turns]
    return torch.tensor([(each + 2**63) % 2**64 - 2**63 for each in units], device=device)
