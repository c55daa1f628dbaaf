"""Figures of students that differ by the seed of their training alone.

All of them answer the same items, so their figures have two kinds of noise. What a seed changes:
Student's interval of the mean over seeds, in which single answers count too. What other items would
change: the intervals of `measure`, taken as if it moved all seeds alike. The two are added as
independent noise is, in squares. That counts what items and seed change together twice, so the
intervals are rather too wide. With one seed they know the noise of items alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xlstm_eval.records import Comparison, EvalError, Interval
from xlstm_eval.statistics import bootstrap
from xlstm_eval.statistics.paired import PairedItems, mean_interval


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; None where nothing is known of its noise."""

    value: float
    interval: Interval | None


def over_seeds(
    values: Sequence[float], items: Interval | None = None, bounds: Interval = (-math.inf, math.inf)
) -> Estimate:
    """Return the mean of one figure of each seed, with the noise of seeds and of items.

    ``items`` is the interval of the mean over other items; None leaves that noise out. ``bounds``
    are the smallest and the largest value that the figure can have.
    """
    value = math.fsum(values) / len(values)
    between = mean_interval(np.asarray(values, dtype=float))
    if between is None and items is None:
        return Estimate(value, None)
    spread = 0.0 if between is None else between[1] - value
    low, high = items or (value, value)
    below, above = math.hypot(spread, value - low), math.hypot(spread, high - value)
    return Estimate(value, (max(bounds[0], value - below), min(bounds[1], value + above)))


def mean_of(intervals: Sequence[Interval]) -> Interval:
    """Return the interval of a mean of figures that the same noise moves alike."""
    low, high = np.mean(intervals, axis=0)
    return float(low), float(high)


class Students:
    """The students of one method, one for each seed, as comparisons with one teacher.

    Each task that counts needs the items of both. Raises EvalError where it has none.
    """

    def __init__(self, seeds: Sequence[Comparison]) -> None:
        self.seeds = seeds
        self.items = {pair.task: _mean_items(seeds, pair.task) for pair in seeds[0].counted()}

    def recovery(self, tasks: Sequence[str]) -> Estimate:
        """Return the mean recovery of some tasks."""
        drawn = bootstrap.draw_all({task: self.items[task] for task in tasks})
        rates = np.stack([1 - losses for losses in drawn.values()], axis=1)
        between = [self._recovery(seed, tasks) for seed in self.seeds]
        items = bootstrap.mean_ratio_interval(rates, math.fsum(between) / len(between))
        return over_seeds(between, items, (0.0, math.inf))

    def gain(self, other: Students, tasks: Sequence[str]) -> Estimate:
        """Return by how much the mean recovery of some tasks is above that of other students.

        Seeds and items are paired. The teacher's scores count as known: their noise is a share of
        the difference, which is small.
        """
        children = np.random.SeedSequence(0).spawn(len(tasks))
        gains = []
        for task, child in zip(tasks, children, strict=True):
            ours, theirs = self.items[task], other.items[task]
            pair = PairedItems(task, theirs.student, ours.student, ours.higher_is_better)
            means = bootstrap.draw_means(pair, np.random.default_rng(child))
            before, after = (self._rates(task, drawn) for drawn in means)
            gains.append(after - before)
        between = [
            self._recovery(after, tasks) - self._recovery(before, tasks)
            for after, before in zip(self.seeds, other.seeds, strict=True)
        ]
        return over_seeds(between, bootstrap.percentile_interval(np.mean(gains, axis=0)))

    def _rates(self, task: str, scores: bootstrap.Array) -> bootstrap.Array:
        items = self.items[task]
        teacher = items.teacher.mean()
        if items.higher_is_better:
            return scores / teacher
        return teacher / np.maximum(scores, bootstrap.LEAST_SCORE)

    @staticmethod
    def _recovery(seed: Comparison, tasks: Sequence[str]) -> float:
        rates = [seed.recovery[task] for task in tasks]
        # A rate is undefined where lower is better and the student's score is 0.
        if None in rates:
            raise EvalError(f"{seed.name}: no recovery rate on {tasks[rates.index(None)]}.")
        return math.fsum(rate for rate in rates if rate is not None) / len(rates)


def _mean_items(seeds: Sequence[Comparison], task: str) -> PairedItems:
    """Return the teacher's items, and the mean score of the students on each of them."""
    found: list[PairedItems] = []
    for seed in seeds:
        pair = next(pair for pair in seed.tasks if pair.task == task)
        items = PairedItems.of(pair)
        if items is None or (found and not np.array_equal(items.teacher, found[0].teacher)):
            raise EvalError(f"{task}: not all students have the items of one teacher.")
        found.append(items)
    student = np.mean([items.student for items in found], axis=0)
    return PairedItems(task, found[0].teacher, student, found[0].higher_is_better)
