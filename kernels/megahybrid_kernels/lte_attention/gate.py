"""Whose gradient a retention score gets."""

from __future__ import annotations

from typing import Literal

Gate = Literal["value", "logit", "counterfactual", "displacing"]

UNSEEN = "counterfactual", "displacing"
"""Those that hear of queries that do not see a token."""
