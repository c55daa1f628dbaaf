"""How well intervals of a rank can hold at best: why those of alpha* hold in more than 95 %.

``python tests/helpers/coverage_bound.py`` prints the least coverage where all tasks lose the same,
of any interval that holds in 93 % where the tasks fall into two groups with alpha* at the edge.

All tasks are known equally well, in normal noise of one standard error. The upper end lies ``u(r)``
above the mean of all losses, where ``u`` is any function of their distances r from that mean, but
at least what a loss would need that is known to be common (1.96 standard errors of the mean). Both
configurations then depend on r by their likelihood ratio alone, so the best ``u`` follows from a
Lagrange multiplier. The lower end is the same with signs turned.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

Array = np.ndarray

LARGEST = 10.0
"""Largest ``u``, in standard errors of the mean: no interval of this size ever errs."""


def likelihood_ratio(losses: Array, above: int, distance: float) -> Array:
    """Return how much likelier distances from the mean are with two groups than with one: (n,).

    ``losses`` (n, J); ``above`` of the J tasks lose ``distance`` more, and any of them may.
    """
    count = losses.shape[1]
    weights = np.exp(distance * (losses - losses.mean(axis=1, keepdims=True)))
    # Sums over all sets of so many tasks: elementary symmetric polynomials, task by task.
    sums = np.zeros((len(losses), above + 1))
    sums[:, 0] = 1.0
    for task in range(count):
        sums[:, 1:] = sums[:, 1:] + sums[:, :-1] * weights[:, task : task + 1]
    between = distance**2 * above * (count - above) / count
    return sums[:, above] / math.comb(count, above) * math.exp(-between / 2)


def least_coverage_of_equals(
    count: int, distance: float, held: float = 0.93, draws: int = 20_000, seed: int = 0
) -> float:
    """Return the least coverage of alpha* where ``count`` tasks lose the same.

    ``held`` is what the intervals hold where the upper group, at whose edge alpha* lies, loses
    ``distance`` standard errors more.
    """
    rank = math.ceil(count / 2)
    above = count - rank + 1
    rng = np.random.default_rng(seed)
    groups = distance * (np.arange(count) >= rank - 1)
    equal = likelihood_ratio(rng.standard_normal((draws, count)), above, distance)
    apart = likelihood_ratio(groups + rng.standard_normal((draws, count)), above, distance)
    # Ends in standard errors of the mean, and how often the truth lies beyond each.
    ends = np.linspace(1.96, LARGEST, 400)
    truth = distance * (rank - 1) / count * math.sqrt(count)
    of_equal, of_apart = special.ndtr(-ends), special.ndtr(truth - ends)

    def errors(multiplier: float) -> tuple[float, float]:
        """Return how often the upper end errs, equal and apart, at one price of the first."""
        grid = np.linspace(-15.0, 15.0, 600)
        cost = np.exp(grid)[:, None] * of_apart - math.exp(multiplier) * of_equal
        best = np.argmin(cost, axis=1)
        places = [np.searchsorted(grid, np.log(ratio)).clip(0, 599) for ratio in (equal, apart)]
        return float(of_equal[best[places[0]]].mean()), float(of_apart[best[places[1]]].mean())

    low, high = -30.0, 30.0
    for _ in range(50):
        middle = (low + high) / 2
        # A higher price makes equals err more, and with them the groups.
        low, high = (middle, high) if errors(middle)[1] <= 1 - held else (low, middle)
    return 1 - 2 * errors(low)[0]


def main() -> None:
    """Print the bound for 15 and 22 tasks."""
    for count in (15, 22):
        for distance in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0):
            least = 100 * least_coverage_of_equals(count, distance)
            print(f"{count} tasks, groups {distance} standard errors apart: {least:.1f} %")


if __name__ == "__main__":
    main()
