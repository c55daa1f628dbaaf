"""All tests and intervals of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlstm_eval.metrics import ALPHAS, MARGIN, signed_loss
from xlstm_eval.records import Comparison, EvalError, Interval, Statistics, TaskEvidence
from xlstm_eval.statistics import bootstrap, paired, ranks
from xlstm_eval.statistics.bootstrap import RANKED
from xlstm_eval.statistics.paired import PairedItems
from xlstm_eval.statistics.pooled import decide

Draws = Mapping[str, bootstrap.Array]


def measure(
    comparison: Comparison, alphas: Sequence[float] = ALPHAS, margin: float = MARGIN
) -> Comparison:
    """Return the comparison with its statistics.

    The same items give the same figures, to the last bit. 60 tasks of 10,000 items take seconds.
    Raises EvalError: a margin outside [0, 1].
    """
    if not 0 <= margin <= 1:
        raise EvalError(f"margin: {margin} is not allowed. Give a number in [0, 1].")
    items = {pair.task: own for pair in comparison.tasks if (own := PairedItems.of(pair))}
    # A single item says nothing about its spread, but for a right or wrong answer.
    usable = {
        task: own
        for task, own in items.items()
        if own.count > 1 or (own.is_binary and own.higher_is_better)
    }
    draws = bootstrap.draw_all(usable)
    counted = comparison.counted()
    missing = [pair.task for pair in counted if pair.task not in draws]
    pooled = decide([usable[pair.task] for pair in counted if pair.task in draws], margin)
    values: dict[str, Any] = {"tasks": _evidence(comparison, items, draws), "pooled": pooled}
    if missing:
        # Without them a decision would hold for a choice of tasks that nobody made on purpose.
        reason = f"no items (or a single one) of {', '.join(missing)}"
        left = {"decision": "undecided", "smallest_margin": None, "reason": reason}
        values |= {"pooled": pooled.model_copy(update=left), "reason": reason}
    elif counted:
        values |= _over_tasks(comparison, usable, draws, alphas)
    else:
        values["reason"] = pooled.reason
    return comparison.model_copy(update={"statistics": Statistics(**values)})


def _evidence(
    comparison: Comparison, items: Mapping[str, PairedItems], draws: Draws
) -> dict[str, TaskEvidence]:
    """Test each task that has items; only those that count share Holm's correction."""
    raw = {task: paired.p_value(own) for task, own in items.items()}
    adjusted = paired.holm({task: p for task, p in raw.items() if task not in comparison.apart})
    found = {}
    for task, own in items.items():
        cells = own.cells() if own.is_binary else None
        found[task] = TaskEvidence(
            items=own.count,
            teacher_only=cells[1] if cells else None,
            student_only=cells[2] if cells else None,
            teacher_interval=paired.score_interval(own.teacher),
            student_interval=paired.score_interval(own.student),
            difference=float(own.gains.mean()),
            difference_interval=paired.difference_interval(own),
            recovery_interval=_recovery(own, comparison.recovery[task], draws.get(task)),
            p_value=raw[task],
            # A task that does not count is tested alone.
            p_value_holm=adjusted.get(task, raw[task]),
        )
    return found


def _recovery(
    items: PairedItems, rate: float | None, losses: bootstrap.Array | None
) -> Interval | None:
    """Return the interval of a recovery rate; None where there is no rate, or it has no bound."""
    if rate is None or losses is None or not _is_bounded(items):
        return None
    low, high = bootstrap.percentile_interval(1 - losses)
    # Means of a few real scores may be drawn below 0; scores, and so their ratios, are not.
    return max(0.0, min(low, rate)), max(high, rate)


def _is_bounded(items: PairedItems) -> bool:
    """Tell whether the score that a recovery divides by is surely above 0."""
    if items.is_binary:
        return True
    interval = paired.score_interval(items.teacher if items.higher_is_better else items.student)
    return interval is not None and interval[0] > 0


def _over_tasks(
    comparison: Comparison,
    items: Mapping[str, PairedItems],
    draws: Draws,
    alphas: Sequence[float],
) -> dict[str, Any]:
    """Return the intervals of what is computed over all tasks that count."""
    pairs = comparison.counted()
    for_ranks = bootstrap.draw_all({pair.task: items[pair.task] for pair in pairs}, 1, RANKED)
    drawn = np.stack(list(for_ranks.values()), axis=1)  # (draws, J)
    low, high = ranks.ranked_intervals(np.array([signed_loss(pair) for pair in pairs]), drawn)
    count = len(pairs)

    def interval(rank: int, estimate: float) -> Interval:
        found = ranks.tolerance_interval(low, high, rank)
        # The estimate is exact; the ends are floats.
        return min(found[0], estimate), max(found[1], estimate)

    return {
        "critical_tolerance": interval(math.ceil(count / 2), comparison.critical_tolerance),
        "critical_tolerance_75": interval(
            math.ceil(3 * count / 4), comparison.critical_tolerance_75
        ),
        "worst_drop": interval(count, comparison.worst_drop),
        "mean_recovery": _mean_recovery(comparison, items, draws),
        "win_and_tie": ranks.rate_intervals(low, high, alphas),
        "sorted_losses": tuple(zip(low.tolist(), high.tolist(), strict=True)),
    }


def _mean_recovery(
    comparison: Comparison, items: Mapping[str, PairedItems], draws: Draws
) -> Interval | None:
    estimate = comparison.mean_recovery
    counted = [pair.task for pair in comparison.counted()]
    rated = [task for task in counted if comparison.recovery[task] is not None]
    if estimate is None or not all(_is_bounded(items[task]) for task in rated):
        return None
    rates = np.stack([1 - draws[task] for task in rated], axis=1)
    low, high = bootstrap.mean_ratio_interval(rates, estimate)
    return max(0.0, low), high
