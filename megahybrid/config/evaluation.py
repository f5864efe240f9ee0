"""The window that evaluation measures from."""

from __future__ import annotations

import math

from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import Config
from megahybrid.key import derived
from megahybrid.mixers import KINDS


def evaluation_window(config: Config) -> int:
    """Keys, the query's own included, beyond which recall is what a model has chosen to remember: evaluate.window, or
    the largest window of its layers, or a quarter of train.seq_length where they have none, or see everything."""
    if config.evaluate.window is not None:
        return config.evaluate.window
    model = derived(config.model)
    largest = max(KINDS[letter].window(model) for letter in parse_pattern(model.pattern).letters)
    return int(largest) if 0 < largest < math.inf else max(1, config.train.seq_length // 4)
