"""Whose gradient a retention score gets."""

from __future__ import annotations

from typing import Literal

Gate = Literal["value", "logit", "counterfactual"]
