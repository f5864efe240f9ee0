"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line, and whether all is right with what it tells of."""

    text: str
    right: bool = True
