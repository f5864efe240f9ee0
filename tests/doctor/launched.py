"""Which kernels are launched, compiled how, with or without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from types import ModuleType
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import megahybrid_kernels
from megahybrid_kernels.launch import Kernel, specialization

# What follows from the number of sequences, or of tokens that they have: a step's work is cut into more programs where
# they are few, or long. `doctor` runs it with few and with many.
BY_BATCH = {
    "attention": {"SPLITS"},
    "lte_attention": {"SPLITS"},
    "native_sparse_attention.triton_decode": {"EACH", "MEAN_SPLITS", "WINDOW_SPLITS", "SELECTED_SPLITS"},
    "gated_delta_rule.triton_step": {"COLUMNS"},
    "gemv": {"AHEAD", "launch_pdl"},  # by what runs before: in a model's step nothing that writes weights
}


def name_of(kernel: Kernel) -> str:
    """Its module and function."""
    function = kernel.jit.fn
    return f"{function.__module__.removeprefix('megahybrid_kernels.')}.{function.__name__}"


def all_kernels() -> set[str]:
    """Names of all there are."""
    values = (value for module in _modules() for value in vars(module).values())
    return {name_of(value) for value in values if isinstance(value, Kernel)}


def _modules() -> Iterator[ModuleType]:
    for module in pkgutil.walk_packages(megahybrid_kernels.__path__, "megahybrid_kernels."):
        yield importlib.import_module(module.name)


def kind(kernel: Kernel, arguments: tuple, options: dict) -> str:
    """A kernel and what it is compiled for: types of tensors, which are left out, constants and launch options."""
    place = name_of(kernel)
    left_out = {name for prefix, names in BY_BATCH.items() if place.startswith(prefix) for name in names}
    parts = [place]
    for name, value in zip(kernel.jit.arg_names, arguments, strict=False):
        if value is None or isinstance(value, torch.Tensor):
            parts.append(f"{name}={None if value is None else value.dtype}")
    return " ".join(parts + [f"{name}={value}" for name, value in options.items() if name not in left_out])


@contextlib.contextmanager
def _noted(note: Callable[[Kernel, tuple, dict], None], run: bool = False) -> Iterator[None]:
    """Tells `note` of every launch; without `run` kernels compute nothing."""
    launch = Kernel.__getitem__

    def getitem(kernel: Kernel, programs: int):
        def noted(*arguments, **options):
            note(kernel, arguments, options)
            if run:
                launch(kernel, programs)(*arguments, **options)

        return noted

    with mock.patch.object(Kernel, "__getitem__", getitem):
        yield


@contextlib.contextmanager
def launches(run: bool) -> Iterator[set[str]]:
    """Fills the set with the kinds of kernels that are launched; without `run` they compute nothing."""
    found: set[str] = set()
    with _noted(lambda *launch: found.add(kind(*launch)), run):
        yield found


def tritons_own(function: Callable) -> Callable[[tuple, dict], str]:
    """What Triton compiles a kernel for, given its arguments and options on an H100."""
    jit = JITFunction(function)
    bind = create_function_from_signature(jit.signature, jit.params, make_backend(GPUTarget("cuda", 90, 32)))

    def told(arguments: tuple, options: dict) -> str:
        _, kinds, others = bind(*arguments, **options)
        return f"{kinds} {sorted(others.items())}"

    return told


@contextlib.contextmanager
def kinds_by_key() -> Iterator[dict[Hashable, set[str]]]:
    """Fills the table with what Triton would compile kernels for that are launched, by kernel and what `Kernel` tells
    apart; they compute nothing."""
    found, tell = defaultdict(set), cache(lambda kernel: tritons_own(kernel.jit.fn))

    def note(kernel: Kernel, arguments: tuple, options: dict) -> None:
        found[kernel, specialization(arguments, options)].add(tell(kernel)(arguments, options))

    with _noted(note):
        yield found


@contextlib.contextmanager
def kernels_without_memory() -> Iterator[None]:
    """Every op takes its kernels for tensors of the meta device, as it would on a GPU."""
    with contextlib.ExitStack() as stack:
        for module in _modules():
            if hasattr(module, "takes_triton"):
                stack.enter_context(mock.patch.object(module, "takes_triton", lambda x, *_, **__: x.is_meta))
        yield
