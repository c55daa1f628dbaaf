"""Tests and intervals of one task, against scipy, statsmodels and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from xlstm_eval.statistics import paired
from xlstm_eval.statistics.paired import PairedItems

smp = pytest.importorskip("statsmodels.stats.proportion")
multitest = pytest.importorskip("statsmodels.stats.multitest")
contingency = pytest.importorskip("statsmodels.stats.contingency_tables")


def items(teacher: list[float], student: list[float], higher: bool = True) -> PairedItems:
    return PairedItems("t", np.array(teacher, float), np.array(student, float), higher)


def counted(both: int, teacher_only: int, student_only: int, neither: int) -> PairedItems:
    teacher = [1] * (both + teacher_only) + [0] * (student_only + neither)
    student = [1] * both + [0] * teacher_only + [1] * student_only + [0] * neither
    return items(teacher, student)


def test_cells_count_the_four_outcomes() -> None:
    assert counted(5, 4, 3, 2).cells() == (5, 4, 3, 2)
    assert counted(5, 4, 3, 2).count == 14


@pytest.mark.parametrize(
    ("teacher_only", "student_only"), [(31, 3), (1, 0), (0, 5), (7, 7), (0, 0), (400, 350)]
)
def test_zeros_and_ones_get_mcnemars_exact_test(teacher_only: int, student_only: int) -> None:
    table = [[20, teacher_only], [student_only, 9]]
    expected = contingency.mcnemar(table, exact=True).pvalue
    found = paired.p_value(counted(20, teacher_only, student_only, 9))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_example_that_was_called_lossless_is_a_loss() -> None:
    assert paired.mcnemar(31, 3) == pytest.approx(8e-7, rel=0.1)


def test_real_items_get_all_sign_flips_while_they_are_few() -> None:
    gains = np.array([0.4, -0.1, 0.3, 0.25, -0.05, 0.6])
    flips = [np.mean(gains * signs) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean([abs(mean) >= abs(gains.mean()) - 1e-12 for mean in flips])
    teacher = np.linspace(0.1, 0.6, 6)
    found = paired.p_value(items(list(teacher), list(teacher + gains)))
    assert found == pytest.approx(expected)


def test_many_real_items_agree_with_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    teacher = rng.gamma(2.0, size=400)
    student = teacher + rng.normal(0.05, 0.5, 400)
    expected = stats.ttest_rel(student, teacher).pvalue
    assert paired.p_value(items(list(teacher), list(student))) == pytest.approx(expected, abs=0.02)
    more = items(list(np.tile(teacher, 3)), list(np.tile(student, 3)))
    rel = stats.ttest_rel(more.student, more.teacher).pvalue
    assert paired.p_value(more) == pytest.approx(rel)


def test_equal_answers_and_single_items_show_nothing() -> None:
    assert paired.p_value(items([0.3, 0.7], [0.3, 0.7])) == 1.0
    assert paired.p_value(items([0.3], [0.7])) == 1.0
    assert paired.p_value(counted(1, 0, 0, 0)) == 1.0
    assert paired.difference_interval(items([0.3], [0.7])) is None
    assert paired.score_interval(np.array([0.3])) is None


def test_holm_agrees_with_statsmodels() -> None:
    rng = np.random.default_rng(2)
    for count in (1, 2, 5, 60):
        raw = {f"t{i}": float(p) for i, p in enumerate(rng.beta(0.4, 2.0, count))}
        expected = multitest.multipletests(list(raw.values()), method="holm")[1]
        assert list(paired.holm(raw).values()) == pytest.approx(list(expected))
        assert list(paired.holm(raw)) == list(raw)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (99, 100), (3, 7), (500, 1000)])
def test_scores_get_wilsons_interval(right: int, count: int) -> None:
    values = np.array([1.0] * right + [0.0] * (count - right))
    expected = smp.proportion_confint(right, count, method="wilson")
    assert paired.score_interval(values) == pytest.approx(expected, abs=1e-9)


def test_real_scores_get_students_interval() -> None:
    values = np.array([1.5, 2.0, 4.0, 3.5])
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert paired.score_interval(values) == pytest.approx(expected)


def test_lower_is_better_turns_the_difference() -> None:
    better = items([2.0, 3.0, 2.5, 2.2], [1.0, 2.0, 1.4, 1.3], higher=False)
    assert better.gains.mean() > 0
    low, high = paired.difference_interval(better) or (0, 0)
    assert low < better.gains.mean() < high
    swapped = PairedItems("t", np.array([1.0, 1, 0, 1]), np.array([1.0, 0, 0, 0]), False)
    low, high = paired.difference_interval(swapped) or (0, 0)
    assert -1 <= low < 0 < high <= 1
    assert low + high > 0


def test_agreement_on_all_items_is_not_certainty() -> None:
    low, high = paired.difference_interval(counted(100, 0, 0, 0)) or (0, 0)
    assert (low, high) == pytest.approx((-0.027, 0.027), abs=1e-3)
    low, high = paired.difference_interval(items([0.2, 0.9, 0.5], [0.2, 0.9, 0.5])) or (0, 0)
    assert low < 0 < high


@pytest.mark.parametrize(
    ("count", "cells"),
    [
        (30, (0.80, 0.10, 0.05, 0.05)),
        (100, (0.95, 0.03, 0.01, 0.01)),
        (500, (0.6, 0.05, 0.05, 0.3)),
    ],
)
def test_intervals_of_differences_cover(count: int, cells: tuple[float, ...]) -> None:
    rng = np.random.default_rng(3)
    drawn = rng.multinomial(count, cells, 1500)
    truth, seen = cells[2] - cells[1], {}
    covered = 0
    for outcome in map(tuple, drawn.tolist()):
        if outcome not in seen:
            low, high = paired.difference_interval(counted(*outcome)) or (0, 0)
            seen[outcome] = low <= truth <= high
        covered += seen[outcome]
    # Exact 95 % is not possible with counts; the error of 1,500 repetitions is 0.6 points.
    assert 0.93 <= covered / 1500 <= 0.98


def test_steadied_items_keep_their_means() -> None:
    steady = paired.steadied(items([0.2, 0.8], [0.3, 0.9]))
    assert steady.count == 4
    assert math.isclose(steady.teacher.mean(), 0.5)
    assert math.isclose(steady.student.mean(), 0.6)
    assert np.ptp(steady.gains) > 0


def test_two_scores_that_are_all_alike_are_not_certain() -> None:
    steady = paired.steadied(items([0.5, 0.5], [0.5, 0.5]))
    assert steady.count == 4
    assert np.ptp(steady.gains) > 0
    assert steady.teacher.mean() == 0.5
