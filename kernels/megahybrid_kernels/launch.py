"""How kernels are launched: in one dimension, and on the device of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton


class Kernel:
    """A Triton kernel; `kernel[programs](...)` launches so many programs of it. Profiles show its `name`.

    They are numbered in one dimension, which holds 2^31 - 1 of them where CUDA's other two end at 65,535: kernels find
    head, chunk or document in the number themselves. They run on the device of the first argument, a tensor, whichever
    is current, also in a backward pass.
    """

    def __init__(self, jit: triton.JITFunction, name: str):
        self.jit, self.name = jit, name

    def __getitem__(self, programs: int) -> Callable[..., object]:
        launch = self.jit[(programs,)]

        def on_device(*args, **options):
            device = args[0].device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return launch(*args, **options)
            with torch.cuda.device(device):
                return launch(*args, **options)

        return on_device


def kernel(function: Callable | None = None, **options) -> Kernel | Callable[[Callable], Kernel]:
    """Decorator for kernels that are launched; what they call is `triton.jit`'s. options: those of `triton.jit`.

    Their names begin with their op's, since two ops may have a `prepare_kernel`.
    """
    if function is None:
        return partial(kernel, **options)
    op = function.__module__.removeprefix("megahybrid_kernels.").partition(".")[0]
    name = f"{op}_{function.__name__.lstrip('_')}"
    return Kernel(triton.jit(function, repr=lambda _: name, **options), name)
