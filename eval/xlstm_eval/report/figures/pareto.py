"""What students lose against what they cost, with the front of those that none beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xlstm_eval.report.entries import Entry, groups_of, pareto_front
from xlstm_eval.report.figures.labels import make_room, place_labels
from xlstm_eval.report.figures.style import INK, MUTED, PAPER, SERIES, new_figure, to_svg
from xlstm_eval.report.names import byte_size, token_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES: dict[str, Callable[[int], str]] = {"state_bytes": byte_size, "tokens": token_count}


def pareto_figure(
    entries: Sequence[Entry], cost: str, loss: str, labels: tuple[str, str]
) -> str | None:
    """Draw a loss over a cost on a logarithmic axis; None where no student's cost is known.

    Students of one set of tasks share a front, and those on it are named. Published rows were
    measured on other tasks, so they are hollow and on no front.
    """
    known = [entry for entry in entries if getattr(entry, cost)]
    if not known:
        return None
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = new_figure(4.9, 3.9)
    groups = groups_of(entries)
    sets = list(dict.fromkeys(groups[entry.name] for entry in known if entry.asked))
    labelled = [entry for entry in known if not entry.asked]
    for index, name in enumerate(sets):
        members = [entry for entry in known if groups[entry.name] == name]
        labelled += _draw_set(axes, members, cost, loss, SERIES[index % len(SERIES)])
    names: dict[tuple[float, float], tuple[str, str]] = {}
    for place, own in _by_place(labelled, cost, loss).items():
        is_printed = not own[0].asked
        if is_printed:
            axes.plot(*place, "o", ms=7, mfc=PAPER, mec=MUTED, mew=1.5, zorder=3)
        names[place] = ", ".join(entry.name for entry in own), MUTED if is_printed else INK
    axes.set_xscale("log")
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: SIZES[cost](round(value))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.5, high * 1.5)
    make_room(axes, names)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    place_labels(axes, names, list(_by_place(known, cost, loss)))
    told = ", ".join(
        f"{entry.name} {getattr(entry.comparison, loss):.3f} at {getattr(entry, cost):.3g}"
        for entry in known
    )
    return to_svg(figure, f"pareto-{cost}-{loss}", f"{labels[1]} over {labels[0]}: {told}.")


def _draw_set(
    axes: Axes, members: Sequence[Entry], cost: str, loss: str, color: str
) -> list[Entry]:
    """Draw the students of one set with their intervals, and their front; return those on it."""
    points = [
        (float(getattr(entry, cost)), float(getattr(entry.comparison, loss))) for entry in members
    ]
    for entry, (x, y) in zip(members, points, strict=True):
        interval = getattr(entry.comparison.statistics, loss, None)
        if interval is not None:
            axes.plot([x, x], list(interval), color=color, lw=1.3, alpha=0.4, zorder=2)
        axes.plot([x], [y], "o", ms=7, color=color, zorder=4, clip_on=False)
    front = pareto_front(points)
    line = [points[index] for index in front]
    axes.plot(*zip(*line, strict=True), color=color, lw=1.4, drawstyle="steps-post", zorder=3)
    return [members[index] for index in front]


def _by_place(
    entries: Sequence[Entry], cost: str, loss: str
) -> dict[tuple[float, float], list[Entry]]:
    """Group entries whose points lie on each other, so that their names do not."""
    found: dict[tuple[float, float], list[Entry]] = {}
    for entry in entries:
        place = (float(getattr(entry, cost)), float(getattr(entry.comparison, loss)))
        found.setdefault(place, []).append(entry)
    return found
