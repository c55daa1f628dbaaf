"""Smoothing of training curves."""

from __future__ import annotations

import pytest

from xlstm_eval.report.figures.curves import smoothed


def test_a_running_mean_keeps_lines_straight_and_ends_where_they_end() -> None:
    line = [3.0 * step for step in range(50)]
    assert smoothed(line, 0.1) == pytest.approx(line)
    assert smoothed([7.0], 0.5) == [7.0]
    assert smoothed([], 0.5) == []


def test_a_running_mean_takes_away_noise() -> None:
    noisy = [(-1.0) ** step for step in range(101)]
    inner = smoothed(noisy, 0.1)[15:-15]
    assert max(abs(value) for value in inner) < 0.1
