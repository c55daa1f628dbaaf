"""What students lose against what they cost, with the front of those that none beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xlstm_eval.report.charts import INK, MUTED, PAPER, SERIES, new_figure, to_svg
from xlstm_eval.report.many import Entry, groups_of, pareto_front


def pareto_figure(
    entries: Sequence[Entry], cost: str, loss: str, labels: tuple[str, str]
) -> str | None:
    """Draw a loss over a cost on a logarithmic axis; None where no student's cost is known.

    Students of one set of tasks share a front. Published rows were measured on other tasks, so
    they are hollow and on no front.
    """
    known = [entry for entry in entries if getattr(entry, cost)]
    if not known:
        return None
    figure, axes = new_figure(5.7, 3.9)
    groups = groups_of(entries)
    sets = list(dict.fromkeys(groups[entry.name] for entry in known if entry.asked))
    for index, name in enumerate(sets):
        members = [entry for entry in known if groups[entry.name] == name]
        _draw_set(axes, members, cost, loss, SERIES[index % len(SERIES)])
    for entry in known:
        x, y = getattr(entry, cost), getattr(entry.comparison, loss)
        if not entry.asked:
            axes.plot([x], [y], "o", ms=7, mfc=PAPER, mec=MUTED, mew=1.5, zorder=3)
        color = INK if entry.asked else MUTED
        axes.annotate(
            entry.name, (x, y), xytext=(7, 4), textcoords="offset points", fontsize=8.5, color=color
        )
    axes.set_xscale("log")
    axes.set(xlabel=labels[0], ylabel=labels[1])
    # Names stand to the right of their points.
    axes.margins(x=0.18, y=0.12)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    names = ", ".join(
        f"{entry.name} {getattr(entry.comparison, loss):.3f} at {getattr(entry, cost):.3g}"
        for entry in known
    )
    return to_svg(figure, f"pareto-{cost}-{loss}", f"{labels[1]} over {labels[0]}: {names}.")


def _draw_set(axes: Any, members: Sequence[Entry], cost: str, loss: str, color: str) -> None:
    """Draw the students of one set of tasks with their intervals, and a line along the front."""
    points = [
        (float(getattr(entry, cost)), float(getattr(entry.comparison, loss))) for entry in members
    ]
    for entry, (x, y) in zip(members, points, strict=True):
        interval = getattr(entry.comparison.statistics, loss, None)
        if interval is not None:
            axes.plot([x, x], list(interval), color=color, lw=1.3, alpha=0.55, zorder=2)
        axes.plot([x], [y], "o", ms=7, color=color, zorder=4)
    front = [points[index] for index in pareto_front(points)]
    axes.plot(*zip(*front, strict=True), color=color, lw=1.4, drawstyle="steps-post", zorder=3)
