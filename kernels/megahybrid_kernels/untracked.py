"""Autograd functions without autograd."""

from __future__ import annotations

from typing import Any

import torch


class _Untracked:
    """In place of a function's context: keeps nothing of what its forward pass would save."""

    def save_for_backward(self, *tensors: object) -> None:
        """Forget them."""

    def set_materialize_grads(self, value: bool) -> None:
        """There are none."""


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, where gradients are off its forward pass alone: what autograd does around it takes
    the host as long as some launches do."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_Untracked(), *arguments)
