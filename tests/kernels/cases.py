"""Which cases of a test Triton's interpreter runs, seconds for each; and inputs of several tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch


def interpreted(few: Collection[Any], every: Iterable[Any]) -> list[Any]:
    """Parameters of a test: `every` case on a GPU and with --slow, else `few` of them."""
    every = list(every)
    assert set(few) <= set(every)
    if torch.cuda.is_available():
        return every
    tuples = [each if isinstance(each, tuple) else (each,) for each in every]
    return [
        pytest.param(*values, marks=[] if each in few else [pytest.mark.slow])
        for each, values in zip(every, tuples, strict=True)
    ]


def one_row(dim: int, out: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs of products of one row."""
    generator = torch.Generator().manual_seed(dim + out)
    shapes = {"x": (1, dim), "other": (1, dim), "norm": (dim,), "weight": (out, dim)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
