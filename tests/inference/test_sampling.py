"""The choice of tokens against closed forms."""

import pytest
import torch

from megahybrid.errors import UserError
from megahybrid.inference.sampling import Sampling, penalise

LOGITS = torch.log(torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15]], dtype=torch.float64))


def kept(**settings) -> dict[int, float]:
    probabilities, tokens = Sampling(temperature=1, **settings).candidates(LOGITS)
    return {int(t): float(p) for p, t in zip(probabilities[0], tokens[0], strict=True) if p > 0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {1, 3, 4, 2, 0}),
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 4}),
        ({"top_k": 3, "top_p": 0.8}, {1, 3}),  # of the three, 0.4 / 0.85 and 0.3 / 0.85 have 0.82 together
        ({"top_k": 99}, {1, 3, 4, 2, 0}),
    ],
)
def test_the_smallest_set_that_has_the_mass(settings, expected):
    assert set(kept(**settings)) == expected


def test_temperature_raises_probabilities_to_its_inverse():
    probabilities, tokens = Sampling(temperature=0.5).candidates(LOGITS)
    squares = LOGITS.exp()[0] ** 2
    assert torch.allclose(probabilities[0], (squares / squares.sum())[tokens[0]])


def test_draws_follow_the_probabilities():
    count = 20_000
    draws = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chosen = Sampling(temperature=1).choose(LOGITS.expand(count, -1), draws)
    found = torch.bincount(chosen, minlength=5) / count
    sigma = (LOGITS.exp()[0] * (1 - LOGITS.exp()[0]) / count).sqrt()
    assert ((found - LOGITS.exp()[0]).abs() < 4 * sigma).all()


def test_the_ends_of_the_range_and_zero_temperature():
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert Sampling(temperature=1, top_p=0.7).choose(LOGITS.expand(2, -1), ends).tolist() == [1, 3]
    assert Sampling(temperature=0).choose(LOGITS, ends[:1]).tolist() == [1]


def test_a_penalty_makes_both_signs_less_likely():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    present = torch.tensor([[True, True, False, False]])
    assert penalise(logits, present, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"repetition_penalty": 0}, {"seed": 2**63}],
)
def test_what_is_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match="it must be"):
        Sampling(**wrong)
