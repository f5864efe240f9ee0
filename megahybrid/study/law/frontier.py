"""The best that a law allows at some compute, and what a loss costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from megahybrid.study.law.law import Array, Law


class TokenCost(NamedTuple):
    """FLOPs of training on a token, factor · N^power, N in parameters; 6 and 1 are the usual estimate."""

    factor: float = 6.0
    power: float = 1.0

    @classmethod
    def of(cls, parameters: Array, flops_per_token: Array) -> TokenCost:
        """The line through the logarithms of runs of one kind; of one size alone, in proportion to parameters."""
        sizes, costs = np.log(parameters), np.log(flops_per_token)
        if np.ptp(sizes) < 1e-6:
            return cls(float(np.exp((costs - sizes).mean())))
        power, factor = np.polyfit(sizes - sizes.mean(), costs, 1)
        return cls(float(np.exp(factor - power * sizes.mean())), float(power))

    def __call__(self, parameters: ArrayLike) -> Array:
        """FLOPs a token."""
        return self.factor * np.power(parameters, self.power)


@dataclass(frozen=True)
class Frontier:
    """What a law says where compute is spent best; all in closed form, for one law or many at once."""

    law: Law
    cost: TokenCost

    @property
    def a_opt(self) -> Array:
        """The best number of parameters grows as compute to this power; nan where the law has no optimum."""
        law, power = self.law, self.cost.power
        falls = (np.asarray(law.alpha) > 0) & (np.asarray(law.beta) > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(falls, law.beta / (law.alpha + law.beta * power), np.nan)

    def parameters(self, flops: ArrayLike) -> Array:
        """N where the loss is least: alpha A / N^alpha = beta · power · B / D^beta, with D = flops / cost of N."""
        law, (factor, power) = self.law, self.cost
        with np.errstate(all="ignore"):
            logarithm = np.log(law.alpha * law.A / (law.beta * power * law.B)) - law.beta * np.log(factor)
            return np.exp(self.a_opt / law.beta * (logarithm + law.beta * np.log(flops)))

    def tokens(self, flops: ArrayLike) -> Array:
        """D there."""
        return flops / self.cost(self.parameters(flops))

    def loss(self, flops: ArrayLike) -> Array:
        """Nats a token there."""
        return self.law.loss(self.parameters(flops), self.tokens(flops))

    def flops(self, loss: ArrayLike) -> Array:
        """The least compute of a loss: what is above E falls as compute to the power alpha · a_opt; infinite where the
        law does not get there."""
        with np.errstate(all="ignore"):
            above = np.asarray(loss - self.law.E)
            ratio = (self.loss(1.0) - self.law.E) / np.where(above > 0, above, np.nan)
            found = np.exp(np.log(ratio) / (self.law.alpha * self.a_opt))
            return np.where(above > 0, found, np.where(np.isnan(self.a_opt), np.nan, np.inf))


def multiplier(base: Frontier, other: Frontier, flops: float) -> Array:
    """Compute that `other` needs for the loss that `base` has at some FLOPs, as a multiple of these; infinite where it
    never gets there. Laws of replicates are paired."""
    return other.flops(base.loss(flops)) / flops
