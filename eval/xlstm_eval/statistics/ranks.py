"""Intervals of losses by rank: alpha*, the worst drop, C_alpha.

The k-th smallest loss of J tasks is at most ``a`` exactly if k tasks lose at most ``a``. Sorting
noisy losses and resampling them gets that wrong: noise spreads sorted losses, and a few tasks
cannot tell how much of their spread is noise. So the intervals invert a test that is valid
whatever the other tasks lose.

The upper end of the k-th loss is the largest ``a`` at which "J - k + 1 tasks or more lose ``a`` or
more" is not rejected: a partial conjunction hypothesis (Benjamini and Heller 2008). It is true if
each task of one set of J - k + 1 loses ``a`` or more. So it is rejected only if that is rejected
for every such set (intersection-union test, Berger 1982), by Fisher's combination of the tasks'
one-sided p-values. Tasks that seem to lose far more than ``a`` would only dilute it: they are left
out, and the p-values of the others are conditioned on that (Ellis, Pecanka and Goeman 2020). The
lower end is the same with signs turned.

Both ends together err in about 5 % of evaluations at most. Where the k-th task stands alone, each
end is tested at 2.5 %. Where it is one of several that lose the same, only one end can err: for
the other, all of these tasks would have to seem off at once. So each end is tested at 5 % as soon
as two tasks are within reach. Elsewhere the ends err less often: the intervals are wide where many
tasks are alike, as any must be that hold in all these cases. Measured coverage: docs/metric.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from xlstm_eval.records import Interval

Array = NDArray[np.float64]

ALONE, TOGETHER = 0.025, 0.05
"""Levels of one end's test: with one task within reach, and with more."""
REACH = 2.0
"""Tasks more standard errors beyond the tested loss have no say."""
WITHIN = float(stats.norm.cdf(REACH))
NODES = np.linspace(-3.0, 3.0, 49)
"""Normal scores at which quantiles are taken from draws; 10,000 draws tell no more."""
FAR = 12.0
"""Normal score up to which curves go on straight behind their last node."""
LEAST_STEP = 1e-15
"""Draws that are all equal have quantiles without any distance."""
ENDS = np.concatenate([[-FAR], NODES, [FAR]])
GRID = np.array([-FAR, -6.0, -4.0, -3.0, -REACH, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, FAR])
"""Normal scores of each task between which an end is searched; -REACH must be one of them."""
STEPS = 10
"""Halvings of a bracket of mostly one standard error: finer than the error of 10,000 draws."""

BLOCK = 1_000_000
"""Numbers worked on at a time, 8 MB: a thousand tasks fit as well."""


def ranked_intervals(losses: Array, draws: Array) -> tuple[Array, Array]:
    """Return the ends of the intervals of all sorted losses, smallest loss first: (J,) each.

    ``losses`` are those of J tasks (J,), ``draws`` those that `bootstrap.draw_losses` gave with
    RANKED (draws, J). Each interval holds the sorted loss itself, and the ends do not fall with the
    rank.
    """
    in_order = np.sort(losses)
    # Draws of a skewed loss lie to one side of it. One task hardly shows that, a sum of many does.
    curves = _quantiles(draws + (losses - np.median(draws, axis=0)))
    high = _upper_ends(curves)
    # The k-th largest of turned signs is the k-th smallest.
    low = -_upper_ends(-curves[:, ::-1])[::-1]
    # A loss is at most 1. And the interval of a rank must not contradict that of the next.
    low = np.minimum(low, in_order)
    high = np.clip(high, in_order, 1.0)
    return np.minimum.accumulate(low[::-1])[::-1], np.maximum.accumulate(high)


def _quantiles(draws: Array) -> Array:
    """Return each task's loss at NODES and, continued in a straight line, at -FAR and FAR."""
    inner = np.quantile(draws, special.ndtr(NODES), axis=0).T  # (J, nodes)
    inner = np.maximum.accumulate(inner + LEAST_STEP * np.arange(len(NODES)), axis=1)
    # The slope of the last half standard error: of a single step it would be mostly noise.
    span = 4
    behind = (FAR - NODES[-1]) / (NODES[-1] - NODES[-1 - span])
    first = inner[:, :1] - behind * (inner[:, span : span + 1] - inner[:, :1])
    last = inner[:, -1:] + behind * (inner[:, -1:] - inner[:, -1 - span : -span])
    return np.concatenate([first, inner, last], axis=1)


def _scores(curves: Array, tested: Array) -> Array:
    """Return how many standard errors below the tested losses each task seems to be: (A, J)."""
    return np.stack([np.interp(tested, curve, ENDS) for curve in curves], axis=1)


def _upper_ends(curves: Array) -> Array:
    """Return the upper end of the loss of each rank: (J,)."""
    count = len(curves)
    needed = np.arange(count, 0, -1)  # tasks that lose as much or more, for ranks 1 to J
    # The test may change its mind where a task comes within reach, so look at all those losses.
    # Between two of them it has one crossing; the other grid points make the brackets short.
    grid = np.sort(_at_scores(curves, GRID))
    blocks = np.array_split(grid, 1 + grid.size * count // BLOCK)
    may_hold = np.concatenate([_may_hold(_scores(curves, block), needed) for block in blocks])
    last = len(grid) - 1 - np.argmax(may_hold[::-1], axis=0)
    low = grid[last]
    high = grid[np.minimum(last + 1, len(grid) - 1)]
    ranks = np.arange(count)
    for _ in range(STEPS):
        middle = (low + high) / 2
        holds = _may_hold(_scores(curves, middle), needed)[ranks, ranks]
        low, high = np.where(holds, middle, low), np.where(holds, high, middle)
    return high


def _at_scores(curves: Array, scores: Array) -> Array:
    """Return the losses that seem so many standard errors above each task's: (J * scores,)."""
    return np.concatenate([np.interp(scores, ENDS, curve) for curve in curves])


def _may_hold(scores: Array, needed: NDArray[np.int_]) -> NDArray[np.bool_]:
    """Tell where ``needed`` tasks or more may lose the tested loss or more: (A, len(needed)).

    ``scores`` (A, J) are those of the tasks at A tested losses.
    """
    tested, count = scores.shape
    scores = np.sort(scores, axis=1)
    # These may lose as much in any case. Rounding must not take a task out at its own grid point.
    far = (scores < -REACH - 1e-9).sum(axis=1)[:, None]
    # Fisher's statistic, over the tasks within reach, from the least to the most surely below.
    evidence = -2 * (special.log_ndtr(-scores) - np.log(WITHIN))
    within = np.arange(count) >= far
    summed = np.cumsum(np.where(within, evidence, 0.0), axis=1)
    # Of all sets with r tasks within reach, the one with the r least sure is rejected last.
    sizes = np.arange(1, count + 1) - far
    accepted = within & (summed <= _critical(count)[np.maximum(sizes, 0)])
    counts = np.concatenate([np.zeros((tested, 1), int), np.cumsum(accepted, axis=1)], axis=1)
    # A set of m tasks has at least m - far, and at most m, within reach.
    most = np.minimum(far + needed, count)
    fewest = np.maximum(needed, far + 1) - 1
    found = np.take_along_axis(counts, most, 1) > np.take_along_axis(counts, fewest, 1)
    return found | (needed <= far)


@functools.cache
def _critical(count: int) -> Array:
    """Return what Fisher's statistic of 0 to ``count`` tasks exceeds in ALONE or TOGETHER."""
    levels = np.full(count, TOGETHER)
    levels[:1] = ALONE
    return np.append(0.0, stats.chi2.isf(levels, 2 * np.arange(1, count + 1)))


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
