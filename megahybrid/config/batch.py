"""The batch rule: a global batch is micro-batch × data parallel replicas × micro-batches of a step."""

from __future__ import annotations

from megahybrid.config.schema import Config


def micro_batches(config: Config, replicas: int) -> int:
    """Micro-batches of a step that pass through every pipeline; at least one, whether or not the division is even."""
    return max(1, config.train.global_batch_size // (config.train.micro_batch_size * replicas))
