"""Huber fits of the law: damped Newton steps, of many fits at once."""

from __future__ import annotations

import numpy as np

from megahybrid.study.law.law import Array, log_loss, slopes

LEAST_DAMPING = 1e-9

ROUNDING = 1e-14
"""Of an objective: near the optimum it hides what a step gains, and Newton's steps go on to lower the gradient."""

IDLE = 12
"""Steps that may follow one another without lowering an objective by more than that."""


def objective(theta: Array, terms: Array, observed: Array, weights: Array, delta: float) -> Array:
    """The weighted sum of Huber losses of the log losses' errors: [fits]; half the squared error where delta is inf."""
    error = np.abs(log_loss(theta, terms)[0] - observed)
    inner = np.minimum(error, delta)
    return (weights * (inner * (error - inner / 2))).sum(axis=-1)


def minimise(
    theta: Array, terms: Array, observed: Array, weights: Array, delta: float, tolerance: float, steps: int
) -> tuple[Array, Array, Array]:
    """Minimise `objective` from each of several starts.

    A step solves (H + damping · M) step = -gradient, with the Hessian H and the matrix M of the iteratively reweighted
    least squares, which is above H: with damping 0 it is Newton's step, and with much it goes down.

    Args:
        theta: [fits, P], the starts.
        terms: [3, runs, P], of `law.terms`.
        observed: log losses, [runs] or [fits, runs].
        weights: of the runs, likewise.
        delta: of Huber's loss.
        tolerance: stop where a step would lower the objective by less than this part of it.
        steps: stop after as many.

    Returns theta, objective [fits] and the gradient's largest element [fits].
    """
    theta = theta.copy()
    observed, weights = (np.broadcast_to(each, (len(theta), terms.shape[1])) for each in (observed, weights))
    value = objective(theta, terms, observed, weights, delta)
    damping, idle = np.full(len(theta), 1e-3), np.zeros(len(theta), int)
    open_ = np.arange(len(theta))
    for _ in range(steps):
        here, seen, weight, damp = theta[open_], observed[open_], weights[open_], damping[open_]
        gradient, hessian, above = _derivatives(here, terms, seen, weight, delta)
        step = _step(gradient, hessian, above, damp)
        new = objective(here + step, terms, seen, weight, delta)
        lower = new <= value[open_] * (1 + ROUNDING)
        theta[open_[lower]] += step[lower]
        decrease = -(gradient * step).sum(axis=-1)
        ended = (damp < 1) & (np.abs(decrease) <= tolerance * value[open_] + 1e-30)
        idle[open_] = np.where(new < value[open_] * (1 - ROUNDING), 0, idle[open_] + 1)
        value[open_[lower]] = new[lower]
        damping[open_] = np.where(lower, np.maximum(damp / 5, LEAST_DAMPING), damp * 7)
        open_ = open_[~ended & (idle[open_] < IDLE)]
        if not len(open_):
            break
    gradient = _derivatives(theta, terms, observed, weights, delta)[0]
    return theta, value, np.abs(gradient).max(axis=-1)


def _derivatives(
    theta: Array, terms: Array, observed: Array, weights: Array, delta: float
) -> tuple[Array, Array, Array]:
    """Gradient [fits, P], Hessian [fits, P, P], and M of `minimise`."""
    predicted, shares = log_loss(theta, terms)
    error = predicted - observed
    slope = slopes(shares, terms)
    transposed = slope.transpose(0, 2, 1)
    pull = weights * np.clip(error, -delta, delta)
    inside = weights * (np.abs(error) < delta)
    reweighted = weights * _kept(error, delta)
    gradient = (transposed @ pull[..., None])[..., 0]
    hessian = (transposed * (inside - pull)[:, None]) @ slope
    for share, term in zip(shares, terms, strict=True):
        squares = (term[:, :, None] * term[:, None, :]).reshape(len(term), -1)
        hessian += ((pull * share) @ squares).reshape(hessian.shape)
    return gradient, hessian, (transposed * reweighted[:, None]) @ slope


def _kept(error: Array, delta: float) -> Array:
    """What part of an error Huber's loss pulls by."""
    return np.ones_like(error) if np.isinf(delta) else delta / np.maximum(np.abs(error), delta)


def _step(gradient: Array, hessian: Array, above: Array, damping: Array) -> Array:
    """Solved in units in which M has ones on its diagonal; a little of the identity keeps what no run decides still."""
    diagonal = np.einsum("fpp->fp", above)
    scale = np.sqrt(diagonal + 1e-12 * diagonal.max(axis=-1, keepdims=True) + 1e-300)
    matrix = (hessian + damping[:, None, None] * above) / (scale[:, :, None] * scale[:, None, :])
    matrix += 1e-3 * damping[:, None, None] * np.eye(gradient.shape[-1])
    return np.linalg.solve(matrix, -(gradient / scale)[..., None])[..., 0] / scale
