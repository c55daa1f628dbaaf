"""Tests and intervals of one task: teacher and student answered the same items.

Tests and intervals come from scipy, except where it has none: Bonett and Price's interval for
a difference of paired shares, and Holm's correction. All levels are 95 %, two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from xlstm_eval.records import Interval, TaskPair

LEVEL = 0.95
QUANTILE = float(stats.norm.ppf(0.5 + LEVEL / 2))
RESAMPLES = 9_999
"""Sign flips of the permutation test; up to 13 items all of them are tried instead."""
MOST_PERMUTED = 1_000
"""With more real items, the paired t-test stands in for the permutation test: it agrees by then."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class PairedItems:
    """Hold both models' scores of the same items (n each)."""

    task: str
    teacher: Vector
    student: Vector
    higher_is_better: bool

    @classmethod
    def of(cls, pair: TaskPair) -> PairedItems | None:
        """Take a pair's items; None where it has none."""
        if pair.teacher_items is None or pair.student_items is None:
            return None
        return cls(
            pair.task,
            np.asarray(pair.teacher_items, dtype=float),
            np.asarray(pair.student_items, dtype=float),
            pair.higher_is_better,
        )

    @property
    def count(self) -> int:
        """Return the number of items."""
        return len(self.teacher)

    @property
    def is_binary(self) -> bool:
        """Tell whether all items are zeros and ones."""
        both = np.concatenate([self.teacher, self.student])
        return bool(np.isin(both, (0.0, 1.0)).all())

    @property
    def gains(self) -> Vector:
        """Return student minus teacher of each item, negative where the student is worse."""
        differences = self.student - self.teacher
        return differences if self.higher_is_better else -differences

    def cells(self) -> tuple[int, int, int, int]:
        """Count the outcomes of zeros and ones: both right, teacher alone, student alone, none."""
        both = int(self.teacher @ self.student)
        teacher, student = int(self.teacher.sum()), int(self.student.sum())
        return both, teacher - both, student - both, self.count - teacher - student + both


def p_value(items: PairedItems) -> float:
    """Test that teacher and student score alike on one task, two-sided.

    Zeros and ones: McNemar's exact test. Real items: signs of the differences are flipped, all of
    them or at random (seeded); beyond MOST_PERMUTED items, the paired t-test.
    """
    if items.is_binary:
        _, teacher_only, student_only, _ = items.cells()
        return mcnemar(teacher_only, student_only)
    gains = items.gains
    if items.count < 2 or not gains.any():
        return 1.0
    if items.count > MOST_PERMUTED:
        return float(stats.ttest_1samp(gains, 0.0).pvalue)
    found = stats.permutation_test(
        (gains,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        # A batch of 16 MB at most, whatever the number of items.
        batch=max(1, 2_000_000 // items.count),
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def mcnemar(teacher_only: int, student_only: int) -> float:
    """Return the exact p-value: items that only one model has right are fair coins."""
    discordant = teacher_only + student_only
    return float(stats.binomtest(student_only, discordant).pvalue) if discordant else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for the number of tests (Holm 1979), in the given order."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    by_size = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(by_size):
        # Step-down: no adjusted value is below that of a smaller one.
        highest = max(highest, min(1.0, (len(by_size) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def score_interval(values: Vector) -> Interval | None:
    """Return the interval of a model's score: Wilson's for zeros and ones, else Student's.

    None for a single real item.
    """
    if np.isin(values, (0.0, 1.0)).all():
        found = stats.binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL, "wilson")
        return float(found.low), float(found.high)
    return mean_interval(values)


def difference_interval(items: PairedItems) -> Interval | None:
    """Return the interval of the mean gain: Bonett and Price's for zeros and ones, else Student's.

    None for a single real item. Source: Bonett and Price 2012, "Adjusted Wald confidence interval
    for a difference of binomial proportions based on paired data": an item is added to each of the
    two outcomes in which the models differ, so that no interval is empty where they agree on all.
    """
    if not items.is_binary:
        return mean_interval(steadied(items).gains)
    _, teacher_only, student_only, _ = items.cells()
    count = items.count + 2
    worse, better = (teacher_only + 1) / count, (student_only + 1) / count
    middle = better - worse
    half = QUANTILE * math.sqrt((better + worse - middle**2) / count)
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return (low, high) if items.higher_is_better else (-high, -low)


def mean_interval(values: Vector) -> Interval | None:
    """Return Student's interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * stats.sem(values))
    return float(values.mean()) - half, float(values.mean()) + half


def steadied(items: PairedItems) -> PairedItems:
    """Return real items whose differences vary.

    Where all differences are equal, they would claim to be known exactly. Then two items that
    differ by the whole range of scores are added, one each way, as Bonett and Price add them to
    zeros and ones. Scores that are all one number tell no range: then it is taken from 0.
    """
    if items.count < 2 or np.ptp(items.student - items.teacher) > 0:
        return items
    both = np.concatenate([items.teacher, items.student])
    half = float(np.ptp(both) or abs(both[0])) / 2
    teacher, student = items.teacher.mean(), items.student.mean()
    return PairedItems(
        items.task,
        np.append(items.teacher, [teacher + half, teacher - half]),
        np.append(items.student, [student - half, student + half]),
        items.higher_is_better,
    )
