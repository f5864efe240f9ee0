"""Dropout's keys against the hash in Python's integers."""

from __future__ import annotations

import pytest
import torch

from megahybrid_kernels import Sequences, dropout_keys
from megahybrid_kernels.counter_dropout.cases import DropoutKeys

LENGTHS = (30, 1, 21)


@pytest.mark.parametrize("seed, step", [(0, 0), (2**33 + 5, 2**31), (-7, 4)])
def test_keys_are_the_hash(seed, step):
    (case,) = DropoutKeys(3, seed, step).cases(LENGTHS)
    x = case.make(torch.float32, torch.Generator())
    keys = case.call(dropout_keys, x, Sequences.of(LENGTHS))
    assert keys.shape == (3, sum(LENGTHS)) and keys.dtype == torch.int64
    assert case.judge(keys, x, Sequences.of(LENGTHS)) == 0
    assert case.judge(keys + (torch.arange(sum(LENGTHS)) == 7), x, Sequences.of(LENGTHS)) == pytest.approx(1 / 52)


def test_a_key_depends_on_all_that_it_is_of():
    def key(sample=5, position=6, seed=7, step=8, layer=1):
        one = torch.tensor([sample]), torch.tensor([position])
        return dropout_keys(*one, seed, step, layer + 1)[layer].item()

    others = [key(sample=6), key(position=5), key(seed=8), key(step=7), key(layer=0), key(sample=5 + 2**32)]
    assert len({key(), *others}) == 7


def test_samples_and_positions_are_one_a_token():
    with pytest.raises(ValueError, match=r"samples are \[3\] and positions \[4\], not one a token"):
        dropout_keys(torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), 0, 0, 1)
