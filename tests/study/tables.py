"""Synthetic studies, whose law is known."""

import csv

import numpy as np

from megahybrid.study.law.fit import Points
from megahybrid.study.law.law import Law

LAW = Law(A=482.0, B=2085.0, E=1.8172, alpha=0.3478, beta=0.3658)
SIZES = np.array([1e6, 2.2e6, 4.6e6, 1e7])
RATIOS = np.array([10.0, 30.0, 90.0])


def ladder(sizes=SIZES, ratios=RATIOS):
    """Parameters and tokens of every size at every ratio of tokens to parameters, each [runs]."""
    parameters = np.repeat(sizes, len(ratios))
    return parameters, parameters * np.tile(ratios, len(sizes))


def isoflop(budgets=(1e17, 1e18, 1e19), sizes=7, spread=8.0, law=LAW):
    """The same of sizes about the best one, at budgets of 6 N D FLOPs."""
    flops = np.repeat(budgets, sizes)
    grid = np.geomspace(1e4, 1e13, 100_000)
    best = np.array([grid[law.loss(grid, each / 6 / grid).argmin()] for each in flops])
    parameters = best * np.tile(np.geomspace(1 / spread, spread, sizes), len(budgets))
    return parameters, flops / 6 / parameters


def noisy(law, parameters, tokens, noise, rng, trunks=None, shared=0.0):
    """Losses whose logarithms have normal noise of which the runs of a trunk share a part of the variance."""
    own = rng.standard_normal(len(parameters))
    common = rng.standard_normal(len(parameters)) if trunks is None else rng.standard_normal(trunks.max() + 1)[trunks]
    return law.loss(parameters, tokens) * np.exp(noise * (np.sqrt(1 - shared) * own + np.sqrt(shared) * common))


def points(law, parameters, tokens, noise=0.0, rng=None):
    """Runs with losses of a law."""
    rng = rng or np.random.default_rng(0)
    return Points(parameters, tokens, noisy(law, parameters, tokens, noise, rng))


def rows(kind, law, parameters, tokens, noise=0.0, rng=None, **columns):
    """Rows of runs.csv, without the columns that no fit reads."""
    losses = noisy(law, parameters, tokens, noise, rng or np.random.default_rng(0))
    return [
        {
            "cell": f"{kind}-{place}",
            "kind": kind,
            "trunk": "",
            "held_out": 0,
            "parameters": size,
            "parameters_without_embedding": 0.9 * size,
            "tokens": count,
            "flops": 6 * size * count,
            "loss": loss,
            "state": "done",
            "excluded": "",
            **columns,
        }
        for place, (size, count, loss) in enumerate(zip(parameters, tokens, losses, strict=True))
    ]


def write(path, rows):
    """A CSV file."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
