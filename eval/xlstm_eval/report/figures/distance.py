"""Long context: recall over the distance to the needle, and loss over the position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xlstm_eval.records import LongContext, Recall
from xlstm_eval.report.figures.style import (
    DASHES,
    INK,
    SERIES,
    draw_legend,
    new_figure,
    new_grid,
    to_svg,
)
from xlstm_eval.report.names import context_length
from xlstm_eval.report.speed import TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2


def recall_figure(found: Mapping[str, LongContext]) -> str | None:
    """Draw the share of needles found over their distance, a panel for each kind.

    Bars are Wilson's intervals. None where no model has such results.
    """
    kinds = list(dict.fromkeys(own.kind for model in found.values() for own in model.recall))
    if not kinds:
        return None
    rows = math.ceil(len(kinds) / COLUMNS)
    # One kind leaves a panel empty: the page would stretch a narrow picture, letters and all.
    figure, grid = new_grid(4.0 * COLUMNS, 0.4 + 2.5 * rows, rows, COLUMNS)
    for index in range(rows * COLUMNS):
        axes = grid[index // COLUMNS][index % COLUMNS]
        if index >= len(kinds):
            axes.set_visible(False)
            continue
        for place, (name, model) in enumerate(found.items()):
            own = [point for point in model.recall if point.kind == kinds[index]]
            _draw_recall(axes, place, name, own)
        axes.set_title(kinds[index], loc="left", fontsize=10, color=INK)
        axes.set(ylim=(-0.03, 1.05), xlabel="distance (tokens)", ylabel="found")
        _double(axes)
    draw_legend(figure, grid[0][0])
    names = ", ".join(f"{name}: {_share(model)}" for name, model in found.items())
    return to_svg(figure, "recall", f"Recall over distance, {len(kinds)} kinds. Found: {names}.")


def _draw_recall(axes: Axes, place: int, name: str, points: Sequence[Recall]) -> None:
    known = sorted(
        (point.distance_tokens, point) for point in points if point.distance_tokens is not None
    )
    if not known:
        return
    at = [distance for distance, _ in known]
    color, style = _look(place, name)
    axes.plot(at, [p.right / p.n for _, p in known], "o", ms=4, color=color, zorder=3)
    shares = [point.right / point.n for _, point in known]
    axes.plot(at, shares, color=color, lw=1.8, ls=style, label=name, zorder=3)
    for distance, point in known:
        axes.plot([distance, distance], list(point.interval), color=color, lw=1.2, alpha=0.45)


def position_figure(found: Mapping[str, LongContext]) -> str | None:
    """Draw the mean loss over the position in the document; None where no model has it."""
    known = {name: model for name, model in found.items() if model.loss_by_position}
    if not known:
        return None
    figure, axes = new_figure(5.7, 3.4)
    for place, (name, model) in enumerate(known.items()):
        bins = model.loss_by_position
        # On a logarithmic axis a bin's middle is the mean of its ends' logarithms.
        middles = [math.sqrt(max(1, own.start) * own.to) for own in bins]
        color, style = _look(place, name)
        axes.plot(middles, [own.nll for own in bins], "o", ms=4, color=color, zorder=3)
        axes.plot(middles, [own.nll for own in bins], color=color, lw=1.8, ls=style, label=name)
    axes.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")
    _double(axes)
    draw_legend(figure, axes)
    last = ", ".join(f"{name} {own.loss_by_position[-1].nll:.3f}" for name, own in known.items())
    return to_svg(figure, "position", f"Loss by position. At the last positions: {last}.")


def _look(place: int, name: str) -> tuple[str, Any]:
    if name == TEACHER:
        return SERIES[6], DASHES[1]
    # The teacher, where it is there, comes first.
    return SERIES[max(0, place - 1) % 6], "-"


def _double(axes: Axes) -> None:
    """Mark doublings on a logarithmic axis of tokens."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(2, numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: context_length(round(value))))
    axes.minorticks_off()


def _share(model: LongContext) -> str:
    asked = sum(point.n for point in model.recall)
    return f"{sum(point.right for point in model.recall)} of {asked}"
