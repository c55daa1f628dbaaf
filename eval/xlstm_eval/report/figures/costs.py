"""Memory and speed of decoding over the context, for teacher and student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from xlstm_eval.report.figures.style import (
    DASHES,
    SERIES,
    draw_legend,
    new_figure,
    to_svg,
)
from xlstm_eval.report.names import byte_size, context_length
from xlstm_eval.report.speed import TEACHER, Speed, SpeedPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def memory_figure(speeds: Mapping[str, Speed]) -> str:
    """Draw the bytes that decoding holds for a sequence over its length."""
    return _figure(
        speeds, lambda point: point.state_bytes, ("memory of a sequence", byte_size), "memory"
    )


def rate_figure(speeds: Mapping[str, Speed]) -> str:
    """Draw decoded tokens a second over the length of the context."""

    def label(value: int | None) -> str:
        return f"{value:,}" if value is not None else "-"

    return _figure(
        speeds, lambda point: point.tokens_per_second, ("decoded tokens/s", label), "rate"
    )


def _figure(
    speeds: Mapping[str, Speed],
    value_of: Callable[[SpeedPoint], float],
    axis: tuple[str, Callable[[int | None], str]],
    key: str,
) -> str:
    name, label = axis
    figure, axes = new_figure(4.6, 3.0)
    ends = []
    for index, (model, speed) in enumerate(speeds.items()):
        contexts = [point.context for point in speed.points]
        values = [value_of(point) for point in speed.points]
        # The first student has the first colour, as in the figures without the teacher.
        color = SERIES[6] if model == TEACHER else SERIES[max(0, index - 1) % 6]
        style = DASHES[1] if model == TEACHER else "-"
        axes.plot(contexts, values, "o", ms=4, color=color, zorder=3)
        axes.plot(contexts, values, color=color, lw=2.0, ls=style, label=model, zorder=3)
        ends.append(f"{model} {label(round(values[-1]))} after {contexts[-1]:,} tokens")
    _label_axes(axes, name, label)
    draw_legend(figure, axes)
    return to_svg(figure, key, f"{name} over the context: {', '.join(ends)}.")


def _label_axes(axes: Axes, name: str, label: Callable[[int | None], str]) -> None:
    """Use logarithms on both axes: contexts double, and a cache of keys grows with them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 4:
        axes.set_ylim(low / 2, high * 2)  # a flat line stays flat
    axes.set(xlabel="context (tokens)", ylabel=name)
    axes.xaxis.set_major_locator(LogLocator(2, numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: context_length(round(value))))
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label(round(value))))
    for own in (axes.xaxis, axes.yaxis):
        own.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
