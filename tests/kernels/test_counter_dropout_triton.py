"""Dropout's keys in Triton: on a GPU where there is one, else on Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from megahybrid_kernels import Sequences
from megahybrid_kernels.counter_dropout import triton
from megahybrid_kernels.counter_dropout.cases import DropoutKeys
from megahybrid_kernels.judging.case import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (300, 1, 213)  # two full blocks and two tokens


def made(shape: DropoutKeys) -> tuple[Case, dict[str, torch.Tensor]]:
    (case,) = shape.cases(LENGTHS)
    return case, {name: x.to(DEVICE) for name, x in case.make(torch.float32, torch.Generator()).items()}


@pytest.mark.parametrize("seed, step", [(0, 0), (1, 1), (16, 2**31), (2**33 + 5, 999_999), (2**63 - 1, 3), (-7, 4)])
def test_keys_are_the_hash(seed, step):
    case, x = made(DropoutKeys(5, seed, step))
    keys = case.call(triton.dropout_keys, x, Sequences.of(LENGTHS))
    assert keys.shape == (5, sum(LENGTHS)) and keys.dtype == torch.int64
    assert case.judge(keys, x, Sequences.of(LENGTHS)) == 0


def test_any_strides():
    _, x = made(DropoutKeys(2))
    apart = torch.stack([x["samples"], x["positions"]], 1)
    keys = triton.dropout_keys(apart[:, 0], apart[:, 1], 3, 4, 2)
    assert torch.equal(keys, triton.dropout_keys(x["samples"], x["positions"], 3, 4, 2))
