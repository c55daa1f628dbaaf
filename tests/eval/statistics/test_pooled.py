"""The decision over all tasks: its error rate, its margin, its edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from xlstm_eval.metrics import compare
from xlstm_eval.records import Pooled, TaskPair
from xlstm_eval.statistics.measure import measure
from xlstm_eval.statistics.paired import PairedItems, mcnemar
from xlstm_eval.statistics.pooled import decide


def counted(both: int, teacher_only: int, student_only: int, neither: int) -> PairedItems:
    cells = [(1, 1)] * both + [(1, 0)] * teacher_only + [(0, 1)] * student_only + [(0, 0)] * neither
    teacher, student = np.array(cells, float).T
    return PairedItems("t", teacher, student, True)


def test_the_example_of_31_against_3_is_inferior() -> None:
    found = decide([counted(1400, 31, 3, 66)])
    assert (found.decision, found.tasks, found.items) == ("inferior", 1, 1500)
    assert found.kept == pytest.approx(1403 / 1431)
    assert found.p_value == pytest.approx(7.6e-7, rel=0.02)
    assert found.smallest_margin is not None
    # At its smallest margin, and not below it, the student is non-inferior.
    assert decide([counted(1400, 31, 3, 66)], found.smallest_margin + 1e-9).decision == (
        "non-inferior"
    )
    assert decide([counted(1400, 31, 3, 66)], found.smallest_margin - 1e-9).decision == "inferior"


def test_few_items_decide_nothing_and_many_equal_ones_are_non_inferior() -> None:
    assert decide([counted(8, 0, 0, 2)]).decision == "undecided"
    assert decide([counted(80, 3, 3, 14)] * 20).decision == "non-inferior"
    assert decide([]).reason


def test_tasks_weigh_the_same_whatever_their_items() -> None:
    small, large = counted(40, 10, 0, 50), counted(8000, 0, 0, 2000)
    assert decide([small, large]).kept == pytest.approx((0.4 + 0.8) / (0.5 + 0.8))


def test_the_p_value_is_that_of_the_sum_and_not_of_the_largest_task() -> None:
    # The student gains on 10,000 items and loses more, as a share, on 100.
    gains, loses = counted(6000, 100, 300, 3600), counted(60, 12, 0, 28)
    found = decide([gains, loses])
    assert mcnemar(112, 300) < 1e-19
    assert found.p_value is not None
    assert found.p_value > 1e-4
    # A normal test by hand; the pairs of outcomes are smoothed by one half of an item.
    worse = [(100.5 / 10001, 300.5 / 10001, 10001), (12.5 / 101, 0.5 / 101, 101)]
    gain = sum(b - a for a, b, _ in worse)
    variance = sum((a + b - (b - a) ** 2) / n for a, b, n in worse)
    expected = 2 * stats.norm.sf(abs(gain) / variance**0.5)
    assert found.p_value == pytest.approx(expected, rel=1e-9)
    # Of as many items each, all items together are the sum.
    alike = decide([counted(70, 12, 2, 16), counted(60, 8, 9, 23)])
    assert alike.p_value == mcnemar(20, 11)


def test_a_single_item_where_lower_is_better_decides_nothing() -> None:
    pair = TaskPair.model_validate(
        {"task": "t", "teacher_items": [1], "student_items": [1], "higher_is_better": False}
    )
    found = measure(compare("s", [pair])).statistics
    assert found is not None
    assert found.pooled.decision == "undecided"
    assert found.pooled.kept is None
    assert found.pooled.reason == "no items (or a single one) of t"


def test_a_few_real_scores_decide_no_more_than_students_test() -> None:
    # By a normal quantile, two items made a student inferior, with p = .003.
    two = decide([PairedItems("t", np.array([0.5, 0.3]), np.array([0.4, 0.1]), True)])
    assert two.decision == "undecided"
    assert two.p_value == pytest.approx(stats.ttest_1samp([-0.1, -0.2], 0).pvalue)
    rng, held, wrong = np.random.default_rng(0), 0, 0
    for _ in range(300):
        teacher = rng.normal(6.0, 0.3, 3)
        student = teacher + rng.normal(-0.12, 0.5, 3)  # true loss: 2 %, the margin
        found = decide([PairedItems("t", teacher, student, True)])
        low, high = found.kept_interval or (0.0, 9.0)
        held += low <= 0.98 <= high
        wrong += found.decision == "non-inferior"
    assert held >= 277  # 95 % are 285; a normal quantile holds in 81 %
    assert wrong <= 15


def test_nobody_keeps_less_than_nothing() -> None:
    found = decide([counted(0, 20, 0, 0)], margin=1.0)
    assert found.kept_interval is not None
    assert found.kept_interval[0] == 0
    assert (found.smallest_margin, found.decision) == (1.0, "non-inferior")


def test_equal_scores_of_any_size_have_an_interval() -> None:
    large = PairedItems("t", np.repeat([1e90, 1e80], 5), np.repeat([1e90, 2e80], 5), True)
    assert np.isfinite(decide([large]).kept_interval or ()).all()


def test_other_scales_count_as_shares_of_the_teacher() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.normal(6.0, 1.0, 80)
    student = teacher - 0.6 + rng.normal(0, 0.3, 80)
    judged = PairedItems("judge", teacher, student, True)
    percent = PairedItems("judge", 10 * teacher, 10 * student, True)
    alone = decide([judged])
    assert alone.kept == pytest.approx(student.mean() / teacher.mean())
    assert alone.decision == "inferior"
    both, scaled = (decide([counted(80, 3, 3, 14), one]) for one in (judged, percent))
    assert both.kept == pytest.approx(scaled.kept)
    assert both.kept_interval == pytest.approx(scaled.kept_interval)


def test_lower_is_better() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.normal(2.0, 0.3, 200)
    worse = PairedItems("nll", teacher, teacher + 0.2 + rng.normal(0, 0.1, 200), False)
    better = PairedItems("nll", teacher, teacher - 0.2 + rng.normal(0, 0.1, 200), False)
    assert decide([worse]).decision == "inferior"
    assert decide([better]).decision == "non-inferior"


def test_a_mcnemar_test_counts_what_is_better_whatever_the_direction() -> None:
    higher = counted(40, 12, 2, 6)
    # The same outcomes, told as errors: a one where there was a zero.
    errors = PairedItems("errors", 1 - higher.teacher, 1 - higher.student, False)
    assert decide([higher, errors]).p_value == pytest.approx(mcnemar(24, 4))
    assert mcnemar(24, 4) < 0.001


def coverage(
    cells: list[tuple[float, ...]], counts: list[int], repetitions: int, margin: float
) -> tuple[float, float]:
    """Return how often the interval of `kept` holds the truth, and how often it is non-inferior."""
    rng = np.random.default_rng(7)
    truth = sum(c[0] + c[2] for c in cells) / sum(c[0] + c[1] for c in cells)
    covered = passed = 0
    for _ in range(repetitions):
        tasks = [counted(*rng.multinomial(n, c)) for n, c in zip(counts, cells, strict=True)]
        found: Pooled = decide(tasks, margin)
        low, high = found.kept_interval or (0, 9)
        covered += low <= truth <= high
        passed += found.decision == "non-inferior"
    return covered / repetitions, passed / repetitions


UNEQUAL = [(0.9, 0.05, 0.02, 0.03), (0.3, 0.1, 0.05, 0.55)]


@pytest.mark.parametrize(
    ("cells", "counts"),
    [
        ([(0.80, 0.05, 0.03, 0.12)], [100]),
        pytest.param(UNEQUAL * 3, [20, 300] * 3, marks=pytest.mark.slow),
        pytest.param([(0.97, 0.01, 0.01, 0.01)] * 10, [50] * 10, marks=pytest.mark.slow),
    ],
)
def test_the_interval_covers_and_the_error_rate_holds(
    cells: list[tuple[float, ...]], counts: list[int]
) -> None:
    loss = 1 - sum(c[0] + c[2] for c in cells) / sum(c[0] + c[1] for c in cells)
    # At a margin equal to the true loss, non-inferior is the error that must stay at 2.5 %.
    covered, passed = coverage(cells, counts, 1000, max(loss, 0.0))
    assert 0.93 <= covered <= 0.98
    assert passed <= 0.04
