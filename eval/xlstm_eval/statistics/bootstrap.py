"""Bootstrap intervals of recovery and of the paper's metric.

Tasks are fixed; items are resampled within a task, in pairs. Two traps are handled.

Ties and zeros. Plain resampling never breaks the tie of two models that agree on all items, and
nearly always breaks any other. So the four outcomes of zeros and ones (both right, one alone,
neither) get weights from a Dirichlet distribution with half an item added to each: Rubin's Bayesian
bootstrap (1981) with Jeffreys' prior. No outcome is impossible because it was not seen, and 10,000
items cost what 10 do. And everything is computed for signed losses ``1 - S/T``, which have no
corner at a tie; only the ends of the finished intervals are cut off at 0.

Sorting. ``alpha*`` is a loss by rank: that of the task in the middle. Noise spreads sorted losses:
the worst looks too bad, the best too good, and resampling adds the same error a second time. So
tasks whose losses are within noise of each other borrow strength: what noise explains of their
spread is taken out of the draws (`_draw_together`, a normal model of random effects). Measured
coverage: docs/metric.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from xlstm_eval.records import Interval
from xlstm_eval.statistics.paired import PairedItems, steadied

RESAMPLES = 10_000
TAILS = (2.5, 97.5)
NEAR = 3.0
"""Losses count as perhaps equal if they differ by fewer standard errors."""
ALIKE = 100.0
"""Tasks borrow strength only where neither is known more exactly than the other by this factor."""
EQUAL = 0.3
"""Prior probability that tasks near each other lose exactly the same share."""
SPREADS = 30
"""Points of the grid for the true spread of losses."""
SLOPE, SAME = 2.0, 0.2
"""Prior deviation of the slope over noise, in spreads; tasks of about equal noise have none."""
ANYWHERE = 100.0
"""Prior deviation of the common mean, in ranges of the losses: it may lie anywhere."""
LEAST_SCORE = 1e-12
"""Drawn means of real scores may fall below 0, where a ratio has no meaning."""

Array = NDArray[np.float64]


def draw_losses(items: PairedItems, rng: np.random.Generator, draws: int = RESAMPLES) -> Array:
    """Draw the loss ``1 - S/T`` of one task (``1 - T/S`` where lower is better): (draws,)."""
    teacher, student = draw_means(items, rng, draws)
    above, below = (student, teacher) if items.higher_is_better else (teacher, student)
    return 1 - above / np.maximum(below, LEAST_SCORE)


def draw_means(
    items: PairedItems, rng: np.random.Generator, draws: int = RESAMPLES
) -> tuple[Array, Array]:
    """Draw teacher's and student's mean score: (draws,) each.

    Real items: both means together from Student's distribution, which their number justifies; at
    least two are needed.
    """
    if items.is_binary:
        weights = rng.dirichlet(np.add(items.cells(), 0.5), draws)  # (draws, 4)
        both = weights[:, 0]
        return both + weights[:, 1], both + weights[:, 2]
    steady = steadied(items)
    values = np.stack([steady.teacher, steady.student])  # (2, n)
    covariance = np.cov(values) / steady.count
    noise = rng.multivariate_normal(
        # Of scores that always rise together, rounding leaves it a little below zero.
        np.zeros(2),
        covariance,
        draws,
        check_valid="ignore",
        method="eigh",
    )
    freedom = steady.count - 1
    noise *= np.sqrt(freedom / rng.chisquare(freedom, (draws, 1)))
    teacher, student = noise.T
    return teacher + items.teacher.mean(), student + items.student.mean()


def ranked_intervals(losses: Array, draws: Array, seed: int = 0) -> tuple[Array, Array]:
    """Return the ends of the intervals of all sorted losses, smallest loss first: (J,) each.

    ``losses`` are those of J tasks (J,), ``draws`` those that `draw_losses` gave (draws, J). Each
    interval holds the sorted loss itself, and the ends do not fall with the rank.
    """
    spread = np.diff(np.percentile(draws, (15.87, 84.13), axis=0), axis=0)[0] / 2
    spread = np.maximum(spread, LEAST_SCORE)  # of scores that are all the same
    in_order = np.sort(losses)
    low, high = np.empty_like(losses), np.empty_like(losses)
    generators = np.random.SeedSequence(seed).spawn(len(losses))
    for rank, at in enumerate(in_order):
        own = spread[np.argmax(losses == at)]
        near = np.abs(losses - at) <= NEAR * np.hypot(spread, own)
        # What is hardly known is near to everything and tells nothing, and its variance beside
        # theirs would make the model's equations singular.
        near &= (spread <= ALIKE * own) & (own <= ALIKE * spread)
        drawn = draws.copy()
        if near.sum() > 1:
            rng = np.random.default_rng(generators[rank])
            drawn[:, near] = _draw_together(losses[near], spread[near], draws[:, near], rng)
        by_rank = np.partition(drawn, rank, axis=1)[:, rank]
        low[rank], high[rank] = np.percentile(by_rank, TAILS)
    # The worst drop is a warning: it must not be talked down by milder tasks. So its upper end is
    # at least that of the task by itself.
    high[-1] = max(high[-1], np.percentile(draws[:, np.argmax(losses)], TAILS[1]))
    # A loss is at most 1. And the interval of a rank must not contradict that of the next.
    low = np.minimum(low, in_order)
    high = np.clip(high, in_order, 1.0)
    return np.minimum.accumulate(low[::-1])[::-1], np.maximum.accumulate(high)


def _draw_together(losses: Array, spread: Array, draws: Array, rng: np.random.Generator) -> Array:
    """Draw the losses of tasks that may be alike: (draws, n).

    Model: a common mean, a slope over the logarithm of a task's noise (large tasks may be the easy
    ones), and each task's own deviation; deviations and slope grow with a spread that is unknown
    and may be 0. The spread is drawn from its posterior, and then the losses given it, by
    correcting draws from the model with what was seen (Matheron's rule).
    """
    count, size = draws.shape[1], max(np.ptp(losses), spread.max())
    slope = SLOPE * _standardised(np.log(spread))
    grid = np.linspace(0, 2 * size, SPREADS)
    # Covariances of the true losses for each spread; of the mean nothing is known beforehand.
    own = np.eye(count) + np.outer(slope, slope)
    model = (ANYWHERE * size) ** 2 + grid[:, None, None] ** 2 * own  # (grid, n, n)
    seen = model + np.diag(spread**2)
    column = np.broadcast_to(losses[:, None], (SPREADS, count, 1))
    misfit = np.linalg.solve(seen, column)[:, :, 0] @ losses
    log_likelihood = -0.5 * (np.linalg.slogdet(seen)[1] + misfit)
    # The flat part has the density that it would have over two standard errors.
    prior = np.full(SPREADS, (1 - EQUAL) * grid[1] / (2 * np.median(spread)))
    prior[0] += EQUAL
    posterior = prior * np.exp(log_likelihood - log_likelihood.max())
    chosen = rng.choice(SPREADS, len(draws), p=posterior / posterior.sum())

    common = ANYWHERE * size * rng.standard_normal((len(draws), 1))
    tilt = slope * rng.standard_normal((len(draws), 1))
    deviation = rng.standard_normal(draws.shape)
    drawn = common + grid[chosen, None] * (tilt + deviation)
    # A draw deviates from the loss as the loss deviates from the truth, with the other sign.
    surprise = losses - (drawn + losses - draws)
    for point in np.unique(chosen):
        rows = chosen == point
        drawn[rows] += surprise[rows] @ np.linalg.solve(seen[point], model[point])
    return drawn


def _standardised(values: Array) -> Array:
    """Return values with mean 0 and deviation 1, or zeros where they hardly differ."""
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > SAME else np.zeros_like(values)


def tolerance_interval(low: Array, high: Array, rank: int) -> Interval:
    """Return the interval of the tolerance at which ``rank`` tasks win or tie."""
    return max(0.0, float(low[rank - 1])), max(0.0, float(high[rank - 1]))


def rate_intervals(low: Array, high: Array, alphas: Sequence[float]) -> dict[str, Interval]:
    """Return the interval of C_alpha at each tolerance, from those of the sorted losses.

    C_alpha reaches k/J exactly if the k-th loss is at most alpha. So its lower end counts the
    losses that are surely at most alpha, its upper end those that may be.
    """
    found = {}
    for alpha in alphas:
        surely, perhaps = (high <= alpha).mean(), (low <= alpha).mean()
        found[str(float(alpha))] = (float(surely), float(perhaps))
    return found


def percentile_interval(draws: Array) -> Interval:
    """Return the middle 95 % of draws of a smooth quantity."""
    low, high = np.percentile(draws, TAILS)
    return float(low), float(high)


def draw_all(items: Mapping[str, PairedItems], seed: int = 0) -> dict[str, Array]:
    """Draw every task's losses. A task's draws depend on its items and its place alone."""
    children = np.random.SeedSequence(seed).spawn(len(items))
    return {
        task: draw_losses(own, np.random.default_rng(child))
        for (task, own), child in zip(items.items(), children, strict=True)
    }
