"""How kernels are launched: in one dimension, on the device of their inputs, and with little work for the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver


class Kernel:
    """A Triton kernel; `kernel[programs](...)` launches so many programs of it. Profiles show its `name`.

    They are numbered in one dimension, which holds 2^31 - 1 of them where CUDA's other two end at 65,535: kernels find
    head, chunk or document in the number themselves. They run on the device of the first argument, a tensor, whichever
    is current, also in a backward pass. Constants are given by name, all other arguments by place.
    """

    def __init__(self, jit: triton.JITFunction, name: str):
        self.jit, self.name = jit, name
        self._compiled: dict[Hashable, tuple[Any, tuple]] = {}

    def __getitem__(self, programs: int) -> Callable[..., None]:
        return partial(self._on_device, programs)

    def _on_device(self, programs: int, *args: Any, **options: Any) -> None:
        device = args[0].device
        if device.type != "cuda":
            self.jit[(programs,)](*args, **options)
        elif device.index == torch.cuda.current_device():
            self._launch(device.index, programs, args, options)
        else:
            with torch.cuda.device(device):
                self._launch(device.index, programs, args, options)

    def _launch(self, device: int, programs: int, args: tuple, options: dict[str, Any]) -> None:
        """What `self.jit` would launch. It asks Triton only once for each kind of arguments: a launch through its
        decorator takes the host twice as long as one of what it has compiled."""
        key = (device, *specialization(args, options))
        if (known := self._compiled.get(key)) and not _watched():
            run, function, metadata, constants = known
            stream = driver.active.get_current_stream(device)
            run(programs, 1, 1, stream, function, metadata, None, None, None, *args, *constants)
            return
        compiled = self.jit[(programs,)](*args, **options)
        # Triton for AMD's GPUs also distinguishes tensors by the size of their memory.
        if torch.version.hip is None:
            constants = tuple(options[name] for name in self.jit.arg_names[len(args) :])
            self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, constants


def _watched() -> bool:
    """Whether Triton tells a profiler of launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def specialization(args: tuple, options: dict[str, Any]) -> tuple[Hashable, ...]:
    """Equal only where Triton compiles the same kernel for NVIDIA's GPUs: what it tells apart are types of tensors and
    whether they are aligned to 16 bytes, the width of integers, whether they are 1 or divide by 16, and constants and
    launch options by value."""
    key: list[Hashable] = [*options, *options.values()]
    for x in args:
        kind = type(x)
        if kind is int:
            width = 4 if -(2**31) <= x < 2**31 else 8 if x < 2**63 else 16
            key.append((width, x == 1 or -(x % 16 == 0)))
        elif kind is float:
            key.append(float)
        elif isinstance(x, torch.Tensor):
            key.append(x.dtype)
            key.append(x.data_ptr() % 16 == 0)
        else:
            key.append((kind, x))
    return tuple(key)


def kernel(function: Callable | None = None, **options) -> Kernel | Callable[[Callable], Kernel]:
    """Decorator for kernels that are launched; what they call is `triton.jit`'s. options: those of `triton.jit`.

    Their names begin with their op's, since two ops may have a `prepare_kernel`.
    """
    if function is None:
        return partial(kernel, **options)
    op = function.__module__.removeprefix("megahybrid_kernels.").partition(".")[0]
    name = f"{op}_{function.__name__.lstrip('_')}"
    return Kernel(triton.jit(function, repr=lambda _: name, **options), name)
