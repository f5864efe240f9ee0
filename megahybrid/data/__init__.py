"""Text to tokens to shards, and back as packed micro-batches in an order that no layout changes."""

from megahybrid.data.loader import TrainingData, ValidationData, validation_batches
from megahybrid.data.packing import Batch, pack
from megahybrid.data.prepare import prepare
from megahybrid.data.prepared import Prepared, open_prepared
from megahybrid.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Prepared",
    "Tokenizer",
    "TrainingData",
    "ValidationData",
    "open_prepared",
    "pack",
    "prepare",
    "validation_batches",
]
