"""The metric: definitions, edge cases, and properties that hold for all scores."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_eval.metrics import (
    compare,
    critical_tolerance,
    no_evidence,
    pair_results,
    recovery_rate,
    required_tolerance,
    win_and_tie_rate,
    win_or_tie,
)
from xlstm_eval.records import EvalError, TaskPair, TaskResult


def pair(
    teacher: float, student: float, *, higher: bool = True, name: str = "task", domain: str = "d"
) -> TaskPair:
    return TaskPair(
        task=name, teacher=teacher, student=student, higher_is_better=higher, domain=domain
    )


def counted(teacher: int, student: int, samples: int) -> TaskPair:
    return TaskPair(
        task="t",
        teacher=teacher / samples,
        student=student / samples,
        samples=samples,
        teacher_correct=teacher,
        student_correct=student,
    )


def result(task: str, correct: int, samples: int = 120, metric: str = "acc") -> TaskResult:
    return TaskResult(
        task=task,
        metric=metric,
        score=correct / samples,
        samples=samples,
        correct=correct,
        domain="d",
    )


@pytest.mark.parametrize(
    ("teacher", "student", "alpha", "wins"),
    [
        (0.8, 0.8, 0.0, True),  # a tie
        (0.8, 0.9, 0.0, True),
        (0.8, 0.79, 0.0, False),
        (0.8, 0.76, 0.05, True),  # exactly (1 - 0.05) * 0.8
        (0.8, 0.7599, 0.05, False),
        (0.7, 0.63, 0.1, True),  # in floats 0.9 * 0.7 is 0.6300000000000001
        (0.0, 0.0, 0.0, True),  # teacher 0: the inequality holds for every student
        (0.0, 0.3, 0.0, True),
        (0.5, 0.0, 0.99, False),
        (0.5, 0.0, 1.0, True),  # at alpha = 1 every student wins or ties
    ],
)
def test_win_or_tie_where_higher_is_better(
    teacher: float, student: float, alpha: float, wins: bool
) -> None:
    assert win_or_tie(pair(teacher, student), alpha) is wins


@pytest.mark.parametrize(
    ("teacher", "student", "alpha", "wins"),
    [
        (10.0, 10.0, 0.0, True),
        (10.0, 9.0, 0.0, True),
        (10.0, 12.5, 0.2, True),  # (1 - 0.2) * 12.5 = 10
        (10.0, 12.6, 0.2, False),
        (0.0, 0.0, 0.0, True),
        (0.0, 1.0, 0.99, False),  # a teacher without error is matched only at alpha = 1
        (0.0, 1.0, 1.0, True),
        (5.0, 0.0, 0.0, True),
    ],
)
def test_win_or_tie_where_lower_is_better(
    teacher: float, student: float, alpha: float, wins: bool
) -> None:
    assert win_or_tie(pair(teacher, student, higher=False), alpha) is wins


def test_counts_decide_where_the_rounded_scores_would_not() -> None:
    # 95/120 is 0.95 of 100/120, but the printed floats are an ulp apart on the wrong side.
    assert not win_or_tie(pair(100 / 120, 95 / 120), 0.05)
    assert win_or_tie(counted(100, 95, 120), 0.05)
    assert critical_tolerance([counted(100, 95, 120)]) == 0.05


@pytest.mark.parametrize(
    ("teacher", "student", "higher", "rate"),
    [
        (0.5, 0.25, True, 0.5),
        (0.5, 1.0, True, 2.0),
        (0.0, 0.5, True, None),
        (10.0, 20.0, False, 0.5),
        (10.0, 0.0, False, None),
        (0.0, 4.0, False, 0.0),
    ],
)
def test_recovery_rate(teacher: float, student: float, higher: bool, rate: float | None) -> None:
    assert recovery_rate(pair(teacher, student, higher=higher)) == rate


def test_critical_tolerance_is_an_order_statistic() -> None:
    pairs = [pair(1.0, student) for student in (1.0, 0.9, 0.8, 0.7)]
    assert critical_tolerance(pairs) == 0.1
    assert critical_tolerance(pairs, rate=0.75) == 0.2
    assert critical_tolerance(pairs, rate=1.0) == 0.3
    assert critical_tolerance(pairs, rate=0.51) == 0.2
    assert critical_tolerance(pairs[1:]) == 0.2  # of three tasks two are needed


def test_the_worst_student_needs_a_tolerance_of_one() -> None:
    assert critical_tolerance([pair(0.5, 0.0), pair(0.3, 0.0)]) == 1.0


def test_compare_collects_all_figures() -> None:
    pairs = [
        pair(1.0, 0.9, name="a", domain="math"),
        pair(0.5, 0.5, name="b", domain="math"),
        pair(0.0, 0.2, name="c", domain="code"),
        pair(0.8, 0.4, name="e", domain="chat"),
    ]
    found = compare("student", pairs, alphas=(0.0, 0.05, 0.1))
    assert found.recovery == {"a": 0.9, "b": 1.0, "c": None, "e": 0.5}
    assert found.recovery_by_domain == {"math": 0.95, "code": None, "chat": 0.5}
    assert found.mean_recovery == 0.8  # the task without a rate does not count
    # Of the three tasks on which the teacher scores, one wins: "c" is no win.
    assert found.apart == {"c": "the teacher's score is 0"}
    assert found.win_and_tie == {"0.0": 1 / 3, "0.05": 1 / 3, "0.1": 2 / 3}
    assert (found.critical_tolerance, found.critical_tolerance_75, found.lossless) == (
        0.1,
        0.5,
        False,
    )
    assert (found.worst_drop, found.worst_task) == (0.5, "e")


def test_a_teacher_that_scores_nothing_makes_no_student_lossless() -> None:
    found = compare("x", [pair(0.0, 0.0, name="a"), pair(0.0, 0.4, name="b")])
    assert not found.lossless
    assert (found.critical_tolerance, found.worst_drop, found.worst_task) == (1.0, 1.0, None)
    assert set(found.win_and_tie.values()) == {0.0}
    assert found.mean_recovery is None


@pytest.mark.parametrize(
    ("correct", "samples", "chance", "apart"),
    [
        (25, 100, 0.25, True),
        (31, 100, 0.25, True),  # binomial test: p = 0.10
        (34, 100, 0.25, False),  # p = 0.03
        (280, 1000, 0.25, False),
        (3, 5, 0.25, True),  # five items do not show that .6 is above .25
        (1, 100, 0.0, False),
        (1, 100, None, False),
    ],
)
def test_a_teacher_at_chance_leaves_nothing_to_compare(
    correct: int, samples: int, chance: float | None, apart: bool
) -> None:
    one = counted(correct, samples, samples).model_copy(update={"chance": chance})
    assert bool(no_evidence(one)) is apart


def test_chance_without_counts_uses_the_standard_error_or_the_score_alone() -> None:
    plain = pair(0.30, 0.2).model_copy(update={"chance": 0.25})
    assert no_evidence(plain) is None
    assert no_evidence(plain.model_copy(update={"teacher_stderr": 0.05})) is not None
    assert no_evidence(plain.model_copy(update={"chance": 0.3})) is not None
    # A perplexity of 0 is the best there is, and has no level of chance.
    assert no_evidence(pair(0.0, 1.0, higher=False)) is None


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf])
def test_a_tolerance_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(EvalError, match=r"alpha: .* is not allowed. Give a number in \[0, 1\]"):
        win_or_tie(pair(1.0, 1.0), alpha)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, math.nan])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(EvalError, match=r"rate: .* is not allowed"):
        critical_tolerance([pair(1.0, 1.0)], rate)


def test_no_tasks_are_refused() -> None:
    for function in (
        critical_tolerance,
        lambda pairs: win_and_tie_rate(pairs, 0.0),
        lambda pairs: compare("x", pairs),
    ):
        with pytest.raises(EvalError, match="tasks: empty"):
            function([])


def test_results_are_joined_by_task_and_must_be_measured_alike() -> None:
    teacher = [result("a", 100), result("b", 60)]
    joined = pair_results(teacher, [result("b", 66), result("a", 95)])
    assert [(p.task, p.teacher_correct, p.student_correct) for p in joined] == [
        ("a", 100, 95),
        ("b", 60, 66),
    ]
    with pytest.raises(EvalError, match="only one of teacher and student has b"):
        pair_results(teacher, [result("a", 95)])
    with pytest.raises(EvalError, match=r"b\.samples: the student has 60, the teacher 120"):
        pair_results(teacher, [result("a", 95), result("b", 30, samples=60)])
    with pytest.raises(EvalError, match=r"b\.metric: the student has 'f1', the teacher 'acc'"):
        pair_results(teacher, [result("a", 95), result("b", 60, metric="f1")])


score = st.one_of(
    st.floats(0, 100), st.integers(0, 100).map(float), st.integers(0, 1000).map(lambda n: n / 1000)
)
decimal_pair = st.builds(
    lambda t, s, higher: pair(t, s, higher=higher), score, score, st.booleans()
)
count_pair = st.integers(1, 500).flatmap(
    lambda n: st.builds(lambda t, s: counted(t, s, n), st.integers(0, n), st.integers(0, n))
)
some_pairs = st.lists(st.one_of(decimal_pair, count_pair), min_size=1, max_size=15)


@given(some_pairs, st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_the_rate_does_not_fall_with_the_tolerance(
    pairs: list[TaskPair], alphas: list[float]
) -> None:
    rates = [win_and_tie_rate(pairs, alpha) for alpha in sorted(alphas)]
    assert all(first <= second for first, second in itertools.pairwise(rates))
    assert win_and_tie_rate(pairs, 1.0) == 1.0


@settings(max_examples=300)
@given(some_pairs, st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_the_critical_tolerance_is_the_smallest_that_reaches_the_rate(
    pairs: list[TaskPair], rate: float
) -> None:
    found = critical_tolerance(pairs, rate)
    assert 0.0 <= found <= 1.0
    assert win_and_tie_rate(pairs, found) >= rate
    if found > 0.0:
        assert win_and_tie_rate(pairs, math.nextafter(found, 0.0)) < rate


@given(some_pairs)
def test_each_pair_wins_from_its_required_tolerance_on(pairs: list[TaskPair]) -> None:
    for one in pairs:
        teacher, student = Fraction(repr(one.teacher)), Fraction(repr(one.student))
        if one.samples is not None:
            teacher, student = Fraction(one.teacher_correct), Fraction(one.student_correct)
        needed = required_tolerance(one)
        better, worse = (student, teacher) if one.higher_is_better else (teacher, student)
        assert better >= (1 - needed) * worse
        if needed > 0:
            assert better < (1 - needed * Fraction(999, 1000)) * worse


@given(
    st.lists(st.builds(result, st.uuids().map(str), st.integers(0, 120)), min_size=1, max_size=15)
)
def test_a_teacher_always_ties_with_itself(results: list[TaskResult]) -> None:
    found = compare("teacher", pair_results(results, results))
    if len(found.apart) == len(results):
        return  # it scores 0 everywhere, and a tie with that says nothing
    assert (found.critical_tolerance, found.critical_tolerance_75, found.worst_drop) == (
        0.0,
        0.0,
        0.0,
    )
    assert found.lossless
    assert set(found.win_and_tie.values()) == {1.0}
