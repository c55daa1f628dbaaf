"""One decision over all tasks: does the student keep enough of its teacher?

Each task has the same weight, however many items it has. The quantity is the sum of the student's
scores over the sum of the teacher's, and its interval is Fieller's, which inverts the test that the
sum of ``S - (1 - margin) T`` is 0. So the decision is a test of non-inferiority. Where real scores
are added up, their spread is an estimate of its own: the test is then Student's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from xlstm_eval.metrics import MARGIN
from xlstm_eval.records import Interval, Pooled
from xlstm_eval.statistics.paired import LEVEL, PairedItems, mcnemar, steadied


@dataclass(frozen=True)
class Moments:
    """Hold means of student and teacher with their variances and covariance.

    ``unsure`` is the square of the difference's variance over its degrees of freedom (Satterthwaite
    1946): 0 for zeros and ones, whose means tell their variances.
    """

    student: float
    teacher: float
    var_student: float
    var_teacher: float
    covariance: float
    unsure: float = 0.0

    @property
    def var_difference(self) -> float:
        """Return the variance of student minus teacher."""
        return max(0.0, self.var_student + self.var_teacher - 2 * self.covariance)

    @property
    def freedom(self) -> float:
        """Return the degrees of freedom of the difference's variance; infinite if it is known."""
        # They are never below those of the smallest task; rounding might take them there.
        return max(1.0, self.var_difference**2 / self.unsure) if self.unsure > 0 else math.inf


def decide(tasks: Sequence[PairedItems], margin: float = MARGIN) -> Pooled:
    """Decide over all tasks. Real-valued tasks need two items or more."""
    count = sum(items.count for items in tasks)
    undecided = Pooled(decision="undecided", margin=margin, tasks=len(tasks), items=count)
    if not tasks:
        return undecided.model_copy(update={"reason": "no task with items counts"})
    found = _sums([_moments(items, len(tasks)) for items in tasks])
    exact = _sums([_moments(items, None) for items in tasks])
    if exact.teacher <= 0:
        return undecided.model_copy(update={"reason": "the teacher's scores add up to 0"})
    kept = exact.student / exact.teacher
    interval = _fieller(found)
    p_value = _p_value(tasks, found)
    values: dict[str, Any] = {"kept": kept, "kept_interval": interval, "p_value": p_value}
    if interval is None:
        values["reason"] = "the teacher's scores are too uncertain for a ratio"
        return undecided.model_copy(update=values)
    # Both were computed on smoothed counts: the estimate may lie a little outside.
    interval = (min(interval[0], kept), max(interval[1], kept))
    if all(x.higher_is_better and (x.is_binary or x.student.min() >= 0) for x in tasks):
        # Nobody keeps less than nothing. Where lower is better, a task may count below 0.
        interval = (max(0.0, interval[0]), interval[1])
    values |= {"kept_interval": interval, "smallest_margin": max(0.0, 1 - interval[0])}
    if interval[0] >= 1 - margin:
        values["decision"] = "non-inferior"
    elif interval[1] < 1:
        values["decision"] = "inferior"
    return undecided.model_copy(update=values)


def _moments(items: PairedItems, tasks: int | None) -> Moments:
    """Return one task's means, as shares of right answers or as shares of the teacher's score.

    Of zeros and ones, an item is shared out over the ``tasks`` for each outcome in which the models
    differ (Bonett and Price 2012): models that agree on all items are not known to be equal. None
    leaves that out.
    """
    if items.is_binary and items.higher_is_better:
        return _binary_moments(items, tasks)
    steady = steadied(items) if tasks else items
    # Of scores on other scales, each counts as if the teacher had scored 1.
    is_share = items.higher_is_better and items.teacher.min() >= 0 and items.teacher.max() <= 1
    mean = float(items.teacher.mean())
    scale = mean if mean > 0 and not (is_share and items.student.max() <= 1) else 1.0
    teacher = steady.teacher / scale
    # Where lower is better, the gains have turned signs: less than the teacher counts as more.
    student = teacher + steady.gains / scale
    covariance = np.cov(np.stack([student, teacher])) / steady.count
    var_difference = float(np.var(student - teacher, ddof=1)) / steady.count
    return Moments(
        float(student.mean()),
        float(teacher.mean()),
        float(covariance[0, 0]),
        float(covariance[1, 1]),
        float(covariance[0, 1]),
        var_difference**2 / (items.count - 1),
    )


def _binary_moments(items: PairedItems, tasks: int | None) -> Moments:
    both, teacher_only, student_only, _ = items.cells()
    added = 1 / tasks if tasks else 0.0
    count = items.count + 2 * added
    teacher = (both + teacher_only + added) / count
    student = (both + student_only + added) / count
    return Moments(
        student,
        teacher,
        student * (1 - student) / count,
        teacher * (1 - teacher) / count,
        (both / count - student * teacher) / count,
    )


def _sums(parts: Sequence[Moments]) -> Moments:
    """Add up independent tasks."""
    return Moments(
        math.fsum(part.student for part in parts),
        math.fsum(part.teacher for part in parts),
        math.fsum(part.var_student for part in parts),
        math.fsum(part.var_teacher for part in parts),
        math.fsum(part.covariance for part in parts),
        math.fsum(part.unsure for part in parts),
    )


def _fieller(sums: Moments) -> Interval | None:
    """Return Fieller's interval of student over teacher; None where it is not bounded.

    It holds every ratio r with ``(S - r T)^2 <= t^2 Var(S - r T)``, a quadratic in r.
    """
    square = float(stats.t.ppf(0.5 + LEVEL / 2, sums.freedom)) ** 2
    a = sums.teacher**2 - square * sums.var_teacher
    b = sums.teacher * sums.student - square * sums.covariance
    c = sums.student**2 - square * sums.var_student
    if a <= 0:
        return None
    root = math.sqrt(max(0.0, b * b - a * c))
    return (b - root) / a, (b + root) / a


def _p_value(tasks: Sequence[PairedItems], sums: Moments) -> float:
    """Test that teacher and student are alike, two-sided.

    Zeros and ones, as many on each task: McNemar's exact test over all items. Else Student's test
    of the sum: over all items, one large task would decide against the sum; there all weigh alike.
    """
    if all(items.is_binary for items in tasks) and len({items.count for items in tasks}) == 1:
        worse = better = 0
        for items in tasks:
            _, teacher_only, student_only, _ = items.cells()
            # Where lower is better, a one of the teacher alone speaks for the student.
            worse += teacher_only if items.higher_is_better else student_only
            better += student_only if items.higher_is_better else teacher_only
        return mcnemar(worse, better)
    if sums.var_difference <= 0:
        return 1.0
    distance = abs(sums.student - sums.teacher) / math.sqrt(sums.var_difference)
    return float(2 * stats.t.sf(distance, sums.freedom))
