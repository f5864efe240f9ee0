"""The exported forms of the kinds of layers by their letters."""

from __future__ import annotations

from megahybrid.mixers import KINDS


class _Exported(dict):
    def __missing__(self, letter: str) -> type:
        return KINDS[letter].exported()


MIXERS = _Exported()
"""Letter → class, imported when it is asked for; an exported model has a table of its own kinds instead."""
