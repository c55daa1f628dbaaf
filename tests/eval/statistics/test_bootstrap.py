"""Intervals of losses by rank: limits, edge cases, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from interval_coverage import COLUMNS, coverage, paired_items, scenarios
from scipy import stats

from xlstm_eval.statistics import bootstrap
from xlstm_eval.statistics.paired import PairedItems

CASES = {case.name: case for case in scenarios()}


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


def test_a_single_task_has_the_interval_of_its_own_draws() -> None:
    items = paired_items([150, 20, 5, 25])
    draws = bootstrap.draw_losses(items, np.random.default_rng(0))
    low, high = bootstrap.ranked_intervals(np.array([15 / 170]), draws[:, None])
    assert (low[0], high[0]) == pytest.approx(bootstrap.percentile_interval(draws))


def ranked(seed: int, tasks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    items = [paired_items(rng.multinomial(80, rng.dirichlet((8, 1, 1, 3)))) for _ in range(tasks)]
    draws = np.stack([bootstrap.draw_losses(one, rng, 500) for one in items], axis=1)
    losses = np.array([1 - one.student.sum() / one.teacher.sum() for one in items])
    return (losses, *bootstrap.ranked_intervals(losses, draws))


@pytest.mark.parametrize(("seed", "tasks"), [(0, 1), (1, 2), (2, 7), (3, 16)])
def test_intervals_hold_the_sorted_losses_and_agree_with_the_rates(seed: int, tasks: int) -> None:
    losses, low, high = ranked(seed, tasks)
    assert (low <= np.sort(losses)).all()
    assert (np.sort(losses) <= high).all()
    assert (high <= 1).all()
    assert (np.diff(low) >= 0).all()
    assert (np.diff(high) >= 0).all()
    for alpha in (0.0, 0.03, 0.2, 1.0):
        fewest, most = bootstrap.rate_intervals(low, high, [alpha])[str(alpha)]
        assert fewest <= (losses <= alpha).mean() <= most
        # C_alpha reaches k/J exactly if the k-th loss is at most alpha.
        assert fewest == sum(end <= alpha for end in high) / tasks
    assert bootstrap.rate_intervals(low, high, [1.0])["1.0"] == (1.0, 1.0)


def test_a_tie_on_all_items_is_not_certain() -> None:
    draws = np.stack(
        [
            bootstrap.draw_losses(paired_items([100, 0, 0, 0]), np.random.default_rng(i))
            for i in (0, 1)
        ],
        axis=1,
    )
    low, high = bootstrap.ranked_intervals(np.zeros(2), draws)
    assert 0 < bootstrap.tolerance_interval(low, high, 1)[1] < 0.05
    assert bootstrap.rate_intervals(low, high, [0.0])["0.0"] == (0.0, 1.0)


def test_noise_does_not_make_the_worst_task_worse() -> None:
    """Twenty tasks that all lose 4 %: the largest of their losses is noise."""
    rng = np.random.default_rng(4)
    items = [paired_items(rng.multinomial(200, (0.73, 0.06, 0.03, 0.18))) for _ in range(20)]
    draws = np.stack([bootstrap.draw_losses(one, rng) for one in items], axis=1)
    losses = np.array([1 - one.student.sum() / one.teacher.sum() for one in items])
    low, _ = bootstrap.ranked_intervals(losses, draws)
    resampled = np.percentile(draws.max(axis=1), 2.5)
    truth = 0.03 / 0.79
    # Plain resampling is sure of a loss that is not there.
    assert resampled > truth
    assert low[-1] <= truth


def test_drawn_scores_below_zero_do_no_harm() -> None:
    items = PairedItems("t", np.array([0.0, 0.0, 3.0]), np.array([1.0, 0.0, 2.0]), True)
    draws = bootstrap.draw_losses(items, np.random.default_rng(0))
    low, high = bootstrap.ranked_intervals(np.array([0.0]), draws[:, None])
    assert np.isfinite([low[0], high[0]]).all()


def test_tasks_that_are_hardly_known_change_nothing_for_others() -> None:
    """Losses without any spread, and one of which the noise has no bound."""
    rng = np.random.default_rng(0)
    losses = np.array([0.0, 0.02, 0.05])
    draws = losses + 0.01 * rng.standard_normal((2000, 3))
    low, high = bootstrap.ranked_intervals(losses, draws)
    for odd in (np.full(2000, 0.5), -1e12 * rng.random(2000)):
        more, drawn = np.append(losses, 0.5), np.column_stack([draws, odd])
        found = bootstrap.ranked_intervals(more, drawn)
        assert np.isfinite(found).all()
        if odd.std() == 0:
            # The third was the worst of three, which has a rule of its own.
            np.testing.assert_allclose(found[0][:2], low[:2], atol=0.002)
            np.testing.assert_allclose(found[1][:2], high[:2], atol=0.002)


# Binomial error of 150 repetitions: 1.8 points. docs/metric.md has a table of more.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["15 tasks, losses of 0 to 30 %", "15 tasks, all lose 3 %"])
def test_intervals_cover_the_truth(name: str) -> None:
    shares = dict(zip(COLUMNS, coverage(CASES[name], 150, draws=400), strict=True))
    # A rate is a multiple of 1/J: its interval can only cover at least 95 %.
    assert shares.pop("C(.05)") >= 0.93
    assert min(shares.values()) >= 0.89
    for smooth in ("recovery", "mean recovery", "kept"):
        assert shares[smooth] <= 0.995


def test_one_tasks_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(8)
    held = 0
    for _ in range(500):
        items = paired_items(rng.multinomial(150, (0.76, 0.06, 0.02, 0.16)))
        low, high = bootstrap.percentile_interval(bootstrap.draw_losses(items, rng, 1000))
        held += low <= 1 - 0.78 / 0.82 <= high
    assert 0.93 <= held / 500 <= 0.97
