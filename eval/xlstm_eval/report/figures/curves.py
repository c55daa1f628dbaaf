"""Losses over steps: a smooth line over the steps' own values, and held-out points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xlstm_eval.report.figures.style import (
    DASHES,
    PAPER,
    SERIES,
    draw_legend,
    new_figure,
    plain_log_ticks,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 400
SPAN = 0.06
"""Share of a curve over which it is smoothed, to each side of a point."""


@dataclass(frozen=True)
class Series:
    """Hold a training curve, and the same figure over held-out rows (steps and values)."""

    steps: Sequence[float]
    values: Sequence[float]
    unit: str = ""
    held_out: tuple[Sequence[float], Sequence[float]] = ((), ())


def smoothed(values: Sequence[float], span: float = SPAN) -> list[float]:
    """Return the mean of each value and its neighbours, ``span`` of all to each side.

    Near the ends there are as many to the left as to the right, so that a fall is not flattened.
    """
    reach = round(span * len(values))
    means = []
    for index in range(len(values)):
        own = min(reach, index, len(values) - 1 - index)
        near = values[index - own : index + own + 1]
        means.append(sum(near) / len(near))
    return means


def loss_figure(stage: str, curves: Mapping[str, Series], key: str) -> str:
    """Draw one stage's curves over steps; logarithmic where all values are positive.

    The thin line is what each step had, the thick one its running mean, circles are held out.
    """
    figure, axes = new_figure(4.6, 3.0)
    for index, (name, series) in enumerate(curves.items()):
        _draw(axes, index, name, series)
    # A loss falls fast and then slowly; an axis of logarithms shows both.
    drawn = [value for own in curves.values() for value in (*own.values, *own.held_out[1])]
    if drawn and min(drawn) > 0:
        axes.set_yscale("log")
        axes.minorticks_off()
        plain_log_ticks(axes.yaxis)
    units = dict.fromkeys(series.unit for series in curves.values() if series.unit)
    axes.set(xlabel="step", ylabel=", ".join(units) or "loss")
    axes.margins(x=0.03)
    draw_legend(figure, axes, columns=2)
    last = [f"{name} {own.values[-1]:.3g}" for name, own in curves.items() if own.values]
    held = [f"{name} {own.held_out[1][-1]:.3g}" for name, own in curves.items() if own.held_out[1]]
    alt = f"Loss of {stage} over steps. Last values: {', '.join(last)}."
    return to_svg(figure, key, alt + (f" Held out: {', '.join(held)}." if held else ""))


def _draw(axes: Axes, index: int, name: str, series: Series) -> None:
    color = SERIES[index % len(SERIES)]
    stride = max(1, len(series.steps) // MAX_POINTS)
    steps, values = series.steps[::stride], series.values[::stride]
    axes.plot(steps, values, color=color, lw=0.8, alpha=0.35)
    style = DASHES[index % len(DASHES)]
    axes.plot(steps, smoothed(values), color=color, lw=2.0, ls=style, label=name)
    at, held = series.held_out
    if held:
        axes.plot(at, held, color=color, lw=1.0, ls=(0, (1, 2)), alpha=0.8)
        points: dict[str, Any] = {
            "ms": 6.0,
            "mfc": PAPER,
            "mec": color,
            "mew": 1.6,
            "ls": "none",
            "zorder": 4,
        }
        axes.plot(at, held, "o", label=f"{name} held out", **points)
