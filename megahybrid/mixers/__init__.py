"""Token mixers, a folder each: all that is particular to a kind of layer.

A folder's `__init__` is light, without torch: the kind's configuration and its `Kind` (see `kind`), all that has to be
known before a model is built. It stands below megahybrid.config. Its `module` computes; it stands between
megahybrid.model's context and its block.

`KINDS` has all of them by letter. Installed packages may add to it (see `kinds`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megahybrid.mixers.kinds import KINDS

__all__ = ["KINDS"]


def __getattr__(name: str) -> Any:
    """`KINDS`, late: it imports all kinds, which themselves import from this folder."""
    if name != "KINDS":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from megahybrid.mixers.kinds import KINDS

    return KINDS
