"""Which steps are left out: those that are not finite, and, if asked for, those that stand out from the last ones."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque

import torch
from torch import Tensor

from megahybrid.config.schema import SkipConfig
from megahybrid.data.packing import moved
from megahybrid.errors import UserError


class StepGuard:
    """Judges every step by its loss and gradient norm, the same on every process.

    Attributes:
        skipped: steps left out so far.
        in_a_row: steps left out since the last accepted one.
    """

    def __init__(self, config: SkipConfig):
        self.config = config
        self.skipped = self.in_a_row = 0
        self._bounds: tuple[tuple, Tensor, Tensor] | None = None
        self._accepted: dict[str, deque[float]] = {
            name: deque(maxlen=config.window) for name in ("loss", "gradient norm")
        }

    def _limits(self) -> list[float]:
        """What neither loss nor gradient norm may exceed."""
        limits = []
        for window in self._accepted.values():
            full = self.config.spikes and len(window) == self.config.window
            spread = self.config.sigma * statistics.pstdev(window) if full else 0
            limits.append(statistics.fmean(window) + spread if full else sys.float_info.max)
        return limits

    def refuses(self, judged: Tensor) -> Tensor:
        """Whether `reason` will have one, or the step is void: a bool on the device.

        judged: float64 `[2 + …]`, loss, gradient norm, and what has to be 0.
        """
        low, high = self._range(tuple(self._limits()), len(judged) - 2, judged.device)
        return (judged.clamp(low, high) != judged).any()  # NaN differs from all

    def _range(self, limits: tuple[float, ...], more: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Between what each has to be; made anew only where a limit is another one."""
        key = limits, more, device
        if self._bounds is None or self._bounds[0] != key:
            largest, rest = sys.float_info.max, [0.0] * more
            ends = [-largest, -largest, *rest], [*(min(limit, largest) for limit in limits), *rest]
            low, high = (moved(torch.tensor(end, dtype=torch.float64), device) for end in ends)
            self._bounds = key, low, high
        return self._bounds[1:]

    def reason(self, loss: float, grad_norm: float) -> str | None:
        """Why this step has to be left out, or None. Changes nothing."""
        for name, value, limit in zip(self._accepted, (loss, grad_norm), self._limits(), strict=True):
            if not math.isfinite(value):
                return f"its {name} is {value}"
            if value > limit:
                mean = statistics.fmean(self._accepted[name])
                return f"its {name} is {value:.4g}, over {mean:.4g} by more than {self.config.sigma:g} deviations"
        return None

    def record(self, loss: float, grad_norm: float, reason: str | None) -> None:
        """Take the judged step in. Raises UserError after too many left out in a row."""
        if reason is None:
            self.in_a_row = 0
            for window, value in zip(self._accepted.values(), (loss, grad_norm), strict=True):
                window.append(value)
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.config.most_in_a_row:
            raise UserError(
                f"{self.in_a_row} steps in a row had to be left out, the last because {reason}; "
                "go back with train.resume_from=STEP and a lower optimizer.learning_rate, or look at the data."
            )

    def state(self) -> dict:
        """What a checkpoint keeps."""
        accepted = {name: list(window) for name, window in self._accepted.items()}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "accepted": accepted}

    def load_state(self, state: dict) -> None:
        """Take over a state that `state` gave."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        for name, window in self._accepted.items():
            window.extend(state["accepted"][name])
