"""What a comparison says, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from xlstm_eval.records import Comparison, TaskEvidence
from xlstm_eval.score import percent

SIGNIFICANT = 0.05
MOST_NAMED = 3


def sentence(result: Comparison) -> str:
    """Say what the student keeps, and where it loses or gains more than noise explains.

    Losses and gains are those with a Holm-adjusted p-value of 5 % or less, the largest first.
    """
    found = result.statistics
    if found is None or found.pooled.kept is None or found.pooled.reason:
        # Without items nothing can be said about noise.
        if result.worst_task is None:
            return "Shows nothing: the teacher is at chance on every task."
        worst = f"{percent(result.worst_drop)} on {result.worst_task}"
        return f"Recovers {percent(result.mean_recovery)} on average; worst drop {worst}."
    shown = {
        task: own
        for task, own in found.tasks.items()
        if task not in result.apart and own.p_value_holm <= SIGNIFICANT
    }
    losses = sorted((t for t in shown if shown[t].difference < 0), key=lambda t: _gain(shown[t]))
    gains = sorted((t for t in shown if shown[t].difference > 0), key=lambda t: -_gain(shown[t]))
    parts = [f"Keeps {100 * found.pooled.kept:.0f} % of its teacher"]
    if losses:
        parts.append(f"loses {_listed(losses, result)}")
    if gains:
        parts.append(f"gains {_listed(gains, result)}")
    rest = found.pooled.tasks - len(shown)
    if rest:
        others = f"{'other' if shown else 'all'} differences on single tasks are"
        parts.append(f"{others} within noise")
    return "; ".join(parts) + "."


def _gain(found: TaskEvidence) -> float:
    return found.difference


def _listed(tasks: Sequence[str], result: Comparison) -> str:
    """Name the first tasks with their differences, and count the others."""
    named = [_amount(task, result) for task in tasks[:MOST_NAMED]]
    more = len(tasks) - len(named)
    if more:
        named.append(f"on {more} more")
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def _amount(task: str, result: Comparison) -> str:
    assert result.statistics is not None
    size = abs(result.statistics.tasks[task].difference)
    pair = next(pair for pair in result.tasks if pair.task == task)
    is_share = pair.higher_is_better and max(pair.teacher, pair.student) <= 1
    return f"{100 * size:.0f} points on {task}" if is_share else f"{size:.3g} on {task}"
