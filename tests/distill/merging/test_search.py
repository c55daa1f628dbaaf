"""The search of weights: on the simplex, the same for the same seed, near the best."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_distill.merging.search import (
    Score,
    Trial,
    best_of,
    error_of_difference,
    on_simplex,
    search,
)


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=9))
def test_weights_sum_to_one_in_whole_steps(variables):
    weights = on_simplex(variables)
    assert all(
        weight >= 0 and round(100 * weight) == pytest.approx(100 * weight) for weight in weights
    )
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)


def best(*scores):
    return scores.index(best_of([Trial(((1.0,),), score) for score in scores]).score)


def test_the_worst_task_counts_first():
    assert best(Score(0.2, -1.0), Score(0.1, -0.5), Score(0.1, -0.6)) == 2


def test_a_difference_within_the_noise_of_the_worst_task_does_not_count():
    """One more right answer of 50 on the hardest task, against a tenth of all the others."""
    uniform, lucky, bad = (
        Score(1.0, -0.57, 0.053),
        Score(0.947, -0.47, 0.053),
        Score(1.0, -0.4, 0.053),
    )
    assert best(uniform, lucky, bad) == 0
    # Of 5,000 items, the same difference is no luck.
    assert best(Score(1.0, -0.57, 0.005), Score(0.947, -0.47, 0.005)) == 1


def scored(recovery, *right, task="hardest"):
    """A merge with these answers (0 or 1) on its worst task, of which the teacher knows half."""
    losses = tuple(1 - answer / 0.5 for answer in right)
    tolerance = max(0.0, math.fsum(losses) / len(losses))
    error = (statistics.pvariance(right) / len(right)) ** 0.5 / 0.5
    return Score(tolerance, -recovery, error, task, losses)


def test_answers_to_the_same_items_are_compared_in_pairs():
    """Five items of a hundred that one merge alone solves are no luck, large as both errors are."""
    better = scored(0.5, *[1] * 30, *[0] * 70)
    worse = scored(0.6, *[1] * 25, *[0] * 75)
    assert error_of_difference(better, worse) == pytest.approx(0.0438, rel=0.01)
    # As if they were independent.
    assert math.hypot(better.error, worse.error) == pytest.approx(0.126, rel=0.01)
    assert best(worse, better) == 1
    # Fewer right answers to other items: within the noise.
    assert best(scored(0.6, *[0] * 20, *[1] * 26, *[0] * 54), better) == 0
    # Other tasks have other items, and there is nothing to pair.
    assert best(scored(0.6, *[1] * 25, *[0] * 75, task="another"), better) == 0
    # A single item's difference is its own error, and decides nothing.
    assert best(scored(0.6, *[1] * 7, *[0] * 42), scored(0.5, *[1] * 8, *[0] * 41)) == 0


def test_of_equally_good_merges_the_first_is_the_best():
    assert best(Score(0.3, -0.5), Score(0.3, -0.5)) == 0


def test_a_search_nears_the_best_weights_and_repeats_itself():
    pytest.importorskip("optuna")
    wanted = (0.6, 0.3, 0.1)
    asked = []

    def score(weights):
        asked.append(weights)
        return Score(math.dist(weights[0], wanted), 0.0)

    trials = list(search(3, 1, 30, 5, score))
    assert trials[0].weights == ((0.34, 0.33, 0.33),)
    assert [trial.weights[0] for trial in trials[1:4]] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert best_of(trials).score.worst_tolerance < 0.1
    assert list(search(3, 1, 30, 5, score)) == trials
    assert [trial.weights for trial in search(3, 1, 30, 6, score)] != asked[:30]
    two = next(iter(search(2, 2, 1, 0, lambda weights: Score(0.0, 0.0))))
    assert two.weights == ((0.5, 0.5), (0.5, 0.5))
