"""Text to tokens to shards, and back as packed micro-batches in an order that no layout changes.

`megahybrid.data.prepare` writes; the names below read. They are imported when they are first used: the processes of
`prepare` need none of them, nor PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megahybrid.data.loader import TrainingData, ValidationData, validation_batches
    from megahybrid.data.packing import Batch, pack
    from megahybrid.data.prepared import Prepared, open_prepared
    from megahybrid.data.tokenizer import Tokenizer

_MODULES = {
    "Batch": "packing",
    "Prepared": "prepared",
    "Tokenizer": "tokenizer",
    "TrainingData": "loader",
    "ValidationData": "loader",
    "open_prepared": "prepared",
    "pack": "packing",
    "validation_batches": "loader",
}

__all__ = [
    "Batch",
    "Prepared",
    "Tokenizer",
    "TrainingData",
    "ValidationData",
    "open_prepared",
    "pack",
    "validation_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
