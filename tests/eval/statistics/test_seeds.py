"""Figures over seeds: their intervals know the noise of seeds and of items."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from xlstm_eval.metrics import compare
from xlstm_eval.records import Comparison, EvalError, TaskPair
from xlstm_eval.statistics.measure import measure
from xlstm_eval.statistics.seeds import Students, mean_of, over_seeds

TASKS = ("a", "b", "c")


def test_noise_of_seeds_and_of_items_adds_in_squares() -> None:
    values = [0.5, 0.6, 0.7]
    spread = stats.t.ppf(0.975, 2) * stats.sem(values)
    found = over_seeds(values, (0.58, 0.66))
    assert found.value == pytest.approx(0.6)
    assert found.interval == pytest.approx(
        (0.6 - math.hypot(spread, 0.02), 0.6 + math.hypot(spread, 0.06))
    )
    assert over_seeds(values).interval == pytest.approx((0.6 - spread, 0.6 + spread))
    assert over_seeds([0.0, 0.9], (0.3, 0.5), (0.0, 1.0)).interval == (0.0, 1.0)


def test_one_seed_has_the_noise_of_items_alone() -> None:
    assert over_seeds([0.4], (0.3, 0.6)).interval == pytest.approx((0.3, 0.6))
    assert over_seeds([0.4]).interval is None
    assert mean_of([(0.1, 0.2), (0.3, 0.6)]) == pytest.approx((0.2, 0.4))


def student(teacher: np.ndarray, right: np.ndarray) -> Comparison:
    """A student as a comparison; both (tasks, items) of zeros and ones."""
    pairs = [
        TaskPair(task=task, teacher_items=tuple(own), student_items=tuple(other))
        for task, own, other in zip(TASKS, teacher.tolist(), right.tolist(), strict=True)
    ]
    return compare("student", pairs)


def simulated(rng: np.random.Generator, gain: float) -> tuple[Students, Students]:
    """Two methods of three seeds: items are hard for all alike, and each seed is lucky or not."""
    easy = rng.normal(0.3, 1.0, (len(TASKS), 150))  # shared by teacher and all students
    teacher = (easy + rng.normal(0.8, 0.5, easy.shape) > 0).astype(float)

    def seed(ability: float) -> Comparison:
        own = ability + rng.normal(0, 0.08)
        return student(teacher, (easy + own + rng.normal(0, 0.5, easy.shape) > 0).astype(float))

    before, after = ([seed(ability) for _ in range(3)] for ability in (0.0, gain))
    return Students(before), Students(after)


def test_a_single_seed_has_the_interval_of_the_report() -> None:
    # Few right answers of the teacher: a mean of drawn ratios is too high by half of its noise.
    rng = np.random.default_rng(1)
    teacher, right = ((rng.random((3, 60)) < share).astype(float) for share in (0.2, 0.15))
    compared = student(teacher, right)
    found, reported = Students([compared]).recovery(TASKS), measure(compared).statistics
    assert found.value == pytest.approx(compared.mean_recovery)
    assert found.interval == pytest.approx(reported.mean_recovery)


def test_intervals_hold_the_true_values_nearly_always() -> None:
    # What seeds and items would give in the end: the share of right answers is a normal integral.
    def score(ability: float, noise: float) -> float:
        return float(stats.norm.cdf((0.3 + ability) / math.sqrt(1 + noise**2)))

    seen = math.hypot(0.5, 0.08)
    teacher, before, after = score(0.8, 0.5), score(0.0, seen), score(0.2, seen)
    rng, rounds, held, kept, widths = np.random.default_rng(5), 120, 0, 0, []
    for _ in range(rounds):
        first, second = simulated(rng, 0.2)
        gain = second.gain(first, TASKS)
        widths.append(gain.interval[1] - gain.interval[0])
        held += gain.interval[0] <= (after - before) / teacher <= gain.interval[1]
        recovery = first.recovery(TASKS).interval
        kept += recovery[0] <= before / teacher <= recovery[1]
    # At a coverage of 95 %, fewer than 90 % of 120 come up once in a hundred times.
    assert held / rounds >= 0.9
    assert kept / rounds >= 0.9
    # And they are of use: three seeds alone have a t of 4.3.
    assert np.median(widths) < 0.25


def test_students_need_the_items_of_one_teacher() -> None:
    teacher = np.ones((3, 4))
    one = student(teacher, teacher)
    teacher[0, 0] = 0
    with pytest.raises(EvalError, match="a: not all students have the items of one teacher"):
        Students([one, student(teacher, np.ones((3, 4)))])
