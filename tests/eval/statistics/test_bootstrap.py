"""Draws of a task's losses: their distribution, edge cases, and the intervals of one task."""

from __future__ import annotations

import numpy as np
import pytest
from interval_coverage import paired_items
from scipy import stats

from xlstm_eval.metrics import compare
from xlstm_eval.records import TaskPair
from xlstm_eval.statistics import bootstrap
from xlstm_eval.statistics.measure import measure
from xlstm_eval.statistics.paired import PairedItems


def test_draws_of_a_share_are_those_of_jeffreys_prior() -> None:
    items = paired_items([50, 10, 0, 40])
    teacher, student = bootstrap.draw_means(items, np.random.default_rng(0))
    # Two of the four outcomes make up a score, each with half an item added.
    expected = stats.beta(61, 41)
    for quantile in (0.025, 0.5, 0.975):
        assert np.quantile(teacher, quantile) == pytest.approx(expected.ppf(quantile), abs=0.01)
    # Student and teacher move together: the difference has less spread than either.
    assert np.std(student - teacher) < 0.7 * np.std(teacher)
    # An outcome that was not seen may happen all the same.
    assert (student > teacher - 0.1).mean() > 0.2


def test_draws_of_real_scores_have_the_means_covariance() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.gamma(3.0, size=60)
    items = PairedItems("t", teacher, 0.9 * teacher + rng.normal(0, 0.2, 60), True)
    drawn = np.stack(bootstrap.draw_means(items, rng))
    expected = np.cov(np.stack([items.teacher, items.student])) / 60
    assert np.cov(drawn) == pytest.approx(expected, rel=0.1)
    assert drawn.mean(axis=1) == pytest.approx([teacher.mean(), items.student.mean()], rel=0.01)


def test_one_tasks_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(8)
    held = 0
    for _ in range(500):
        items = paired_items(rng.multinomial(150, (0.76, 0.06, 0.02, 0.16)))
        low, high = bootstrap.percentile_interval(bootstrap.draw_losses(items, rng, 1000))
        held += low <= 1 - 0.78 / 0.82 <= high
    assert 0.93 <= held / 500 <= 0.97


def test_a_mean_of_noisy_ratios_is_not_shifted() -> None:
    """Teachers at 6 %: each drawn ratio is 1.4 points too high, and no averaging takes that out."""
    rng = np.random.default_rng(0)
    items = paired_items([16, 8, 4, 372])
    rates = np.stack([1 - bootstrap.draw_losses(items, rng, 1000) for _ in range(600)], axis=1)
    low, high = bootstrap.percentile_interval(rates.mean(axis=1))
    estimate = 20 / 24
    assert low > estimate
    moved = bootstrap.mean_ratio_interval(rates, estimate)
    assert np.mean(moved) == pytest.approx(estimate, abs=0.001)
    assert np.ptp(moved) == pytest.approx(high - low)
    # A single task keeps the interval that its recovery has.
    alone = bootstrap.mean_ratio_interval(rates[:, :1], estimate)
    assert alone == bootstrap.percentile_interval(rates[:, 0])


def recoveries(few: dict[str, list[float]]) -> list[tuple[float, float] | None]:
    """Return the intervals of a recovery, and of the mean of two such."""
    pairs = [TaskPair.model_validate({"task": task} | few) for task in ("a", "b")]
    found = measure(compare("s", pairs)).statistics
    assert found is not None
    return [found.mean_recovery, found.tasks["a"].recovery_interval]


def test_recovery_is_never_below_zero() -> None:
    """Of two real items, the student's mean is drawn below 0."""
    for interval in recoveries({"teacher_items": [20.0, 21.0], "student_items": [20.0, 1.0]}):
        assert interval is not None
        assert interval[0] == 0
        assert 0.5 < interval[1] < 20


def test_a_recovery_without_any_bound_has_no_interval() -> None:
    """The teacher's mean may be 0: its ratio may be anything."""
    few = {"teacher_items": [1.5, 2.5, -0.5], "student_items": [1.0, 2.0, 0.0]}
    assert recoveries(few) == [None, None]
