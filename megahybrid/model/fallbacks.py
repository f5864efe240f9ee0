"""What of a model runs without kernels on a GPU, found from its configuration before anything runs."""

from __future__ import annotations

import torch

from megahybrid.config.schema import Config
from megahybrid.errors import UserError
from megahybrid.mixers import KINDS
from megahybrid.model.settings import Settings


def kernel_notes(config: Config, device: torch.device, dtype: torch.dtype, training: bool) -> list[str]:
    """A sentence for every op that takes PyTorch's path on this device, in the model's `dtype`, and why.

    Raises UserError where training would take memory quadratic in a document's length for want of a kernel.
    """
    if device.type != "cuda":
        return []
    settings = Settings.of(config)
    mixers = [KINDS[letter].module() for letter in dict.fromkeys(settings.pattern.letters)]
    found = dict.fromkeys(each for mixer in mixers for each in mixer.fallbacks(settings.model, dtype))
    for each in found:
        if training and each.quadratic:
            raise UserError(
                f"{each.key}: {each.op}'s kernels {each.reason}, and without them training takes memory that grows "
                "with the square of a document's length; choose a value, or a GPU, that they take."
            )
    return [
        f"{each.op} runs in PyTorch here, many times slower than its kernels, which {each.reason} ({each.key})."
        for each in found
    ]
