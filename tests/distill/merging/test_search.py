"""The search of weights: on the simplex, the same for the same seed, near the best."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_distill.merging.search import Score, Trial, best_of, on_simplex, search


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
