"""Bootstrap of a task's recovery and loss.

Tasks are fixed; items are resampled within a task, in pairs. Plain resampling never breaks the tie
of two models that agree on all items, and nearly always breaks any other. So the four outcomes of
zeros and ones (both right, one alone, neither) get weights from a Dirichlet distribution with half
an item added to each: Rubin's Bayesian bootstrap (1981) with Jeffreys' prior. No outcome is
impossible because it was not seen, and 10,000 items cost what 10 do. Losses ``1 - S/T`` keep their
sign, so a tie is no corner. What several tasks say together about ranks of losses: `ranks`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from xlstm_eval.records import Interval
from xlstm_eval.statistics.paired import PairedItems, steadied

RESAMPLES = 10_000
TAILS = (2.5, 97.5)
LEAST_SCORE = 1e-12
"""Drawn means of real scores may fall below 0, where a ratio has no meaning."""

ALONE = (0.5, 0.5, 0.5, 0.5)
"""Items added to the four outcomes for figures of one task, and for means."""
RANKED = (0.5, 1.0, 1.0, 0.5)
"""Items added where p-values of many tasks are combined, which adds up the errors of each. So an
item is added to each outcome in which the models differ, as Bonett and Price do (2012)."""

Array = NDArray[np.float64]
Added = tuple[float, float, float, float]


def draw_losses(
    items: PairedItems, rng: np.random.Generator, draws: int = RESAMPLES, added: Added = ALONE
) -> Array:
    """Draw the loss ``1 - S/T`` of one task (``1 - T/S`` where lower is better): (draws,)."""
    teacher, student = draw_means(items, rng, draws, added)
    above, below = (student, teacher) if items.higher_is_better else (teacher, student)
    return 1 - above / np.maximum(below, LEAST_SCORE)


def draw_means(
    items: PairedItems, rng: np.random.Generator, draws: int = RESAMPLES, added: Added = ALONE
) -> tuple[Array, Array]:
    """Draw teacher's and student's mean score: (draws,) each.

    Real items: both means together from Student's distribution, which their number justifies; at
    least two are needed.
    """
    if items.is_binary:
        weights = rng.dirichlet(np.add(items.cells(), added), draws)  # (draws, 4)
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


def percentile_interval(draws: Array) -> Interval:
    """Return the middle 95 % of draws of a smooth quantity."""
    low, high = np.percentile(draws, TAILS)
    return float(low), float(high)


def mean_ratio_interval(draws: Array, estimate: float) -> Interval:
    """Return the interval of the mean of several ratios from their draws (draws, n).

    The mean of drawn ratios is too high where the denominators are noisy, and averaging makes the
    noise smaller, but not this. So the draws are moved until their median is the estimate.
    """
    means = draws.mean(axis=1)
    shift = float(np.median(means)) - estimate if draws.shape[1] > 1 else 0.0
    low, high = percentile_interval(means)
    return min(low - shift, estimate), max(high - shift, estimate)


def draw_all(
    items: Mapping[str, PairedItems], seed: int = 0, added: Added = ALONE
) -> dict[str, Array]:
    """Draw every task's losses. A task's draws depend on its items and its place alone."""
    children = np.random.SeedSequence(seed).spawn(len(items))
    return {
        task: draw_losses(own, np.random.default_rng(child), added=added)
        for (task, own), child in zip(items.items(), children, strict=True)
    }
