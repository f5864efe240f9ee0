"""Which samples a step takes: a function of the step alone, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megahybrid.errors import UserError


class SampleOrder:
    """Global batches of `global_batch_size` samples; an epoch's ragged tail is dropped."""

    def __init__(self, epoch_order: Callable[[int], NDArray[np.int64]], samples: int, global_batch_size: int):
        """`epoch_order(epoch)` permutes `samples` indices. Raises UserError if they do not fill one batch."""
        if samples < global_batch_size:
            raise UserError(
                f"The prepared text holds {samples:,} samples, fewer than train.global_batch_size "
                f"({global_batch_size:,}); add text or lower it."
            )
        self._epoch_order = epoch_order
        self._global_batch_size = global_batch_size
        self.steps_per_epoch = samples // global_batch_size
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> NDArray[np.int64]:
        """Indices of the samples that data parallel rank `dp_rank` of `dp_size` takes at `step` (0-based)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._epoch_order(epoch), epoch
        begin = index * self._global_batch_size
        return self._order[begin : begin + self._global_batch_size][dp_rank::dp_size]
