"""Figures of the report as inline SVG: pure functions of data, the same bytes for the same data.

Colours are written as CSS variables of the page (templates/report.html.j2), so that one figure serves light and dark
mode. The palette is Okabe and Ito's, which stays distinct under colour blindness; line styles differ as well.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xlstm_eval.metrics import required_tolerance
from xlstm_eval.records import Comparison
from xlstm_eval.score import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that matplotlib writes as they are, and the page's variables that replace them.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0500{index:02x}" for index in range(8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    color: f"--c{index}" for index, color in enumerate(SERIES)
}
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.4)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1.5)),
    (0, (8, 2)),
)
RASTER_CELLS = 600  # beyond this many cells a heat map is an embedded bitmap: a rectangle each would be too large
MAX_POINTS = 400


def win_and_tie_figure(comparisons: Sequence[Comparison], merged: str) -> str:
    """Draw C_alpha over alpha as the exact step function; the headline model thick, the others thin."""
    figure, axes = _figure(5.7, 3.9)
    limit = max(0.1, 1.15 * max(c.critical_tolerance_75 for c in comparisons))
    limit = min(1.0, round(limit + 0.05, 1))
    axes.axhline(0.5, color=MUTED, lw=0.9, ls=(0, (2, 3)))
    axes.text(limit, 0.485, "C = 0.5", color=MUTED, fontsize=9, ha="right", va="top")
    ordered = sorted(enumerate(comparisons), key=lambda item: item[1].name == merged)
    for index, result in ordered:
        steps = sorted(float(required_tolerance(pair)) for pair in result.tasks)
        x = [0.0, *(step for step in steps if step < limit), limit]
        y = [(sum(step <= at for step in steps)) / len(steps) for at in x]
        thick = result.name == merged
        axes.plot(
            x,
            y,
            drawstyle="steps-post",
            color=SERIES[index % len(SERIES)],
            lw=3.2 if thick else 1.5,
            ls="-" if thick else DASHES[index % len(DASHES)],
            label=result.name,
            zorder=4 if thick else 3,
            clip_on=False,
            solid_joinstyle="miter",
        )
        if thick and result.critical_tolerance <= limit:
            at = result.critical_tolerance
            height = sum(step <= at for step in steps) / len(steps)
            axes.plot(
                [at],
                [height],
                "o",
                ms=8,
                color=SERIES[index],
                mec=PAPER,
                mew=1.6,
                zorder=6,
                clip_on=False,
            )
    axes.set(xlim=(0, limit), ylim=(0, 1.02), xlabel="tolerance α", ylabel="Win-and-Tie rate C(α)")
    _legend(figure, axes, order=[result.name for result in comparisons])
    names = ", ".join(
        f"{c.name}: C(0.05) {c.win_and_tie.get('0.05', float('nan')):.2f}" for c in comparisons
    )
    return _svg(figure, "wat", f"Win-and-Tie rate over tolerance. {names}.")


def recovery_figure(comparisons: Sequence[Comparison], merged: str) -> str:
    """Draw mean recovery per domain, one bar for each model; the line at 100 % is the teacher."""
    groups = [*comparisons[0].recovery_by_domain, "all tasks"]
    figure, axes = _figure(5.7, 3.9)
    width = 0.8 / len(comparisons)
    top, labels = 1.0, groups
    for index, result in enumerate(comparisons):
        rates = [*result.recovery_by_domain.values(), result.mean_recovery]
        places = [
            at - 0.4 + width * (index + 0.5) for at, rate in enumerate(rates) if rate is not None
        ]
        values = [100 * rate for rate in rates if rate is not None]
        top = max([top, *(value / 100 for value in values)])
        thick = result.name == merged
        bars = axes.bar(
            places,
            values,
            width * 0.88,
            color=SERIES[index % len(SERIES)],
            label=result.name,
            zorder=3,
        )
        for bar in bars:
            bar.set_alpha(1.0 if thick else 0.62)
        if thick:
            labels = [f"{g}\n{percent(rate)}" for g, rate in zip(groups, rates, strict=True)]
    axes.axhline(100, color=INK, lw=1.1, ls=(0, (4, 3)), zorder=4)
    axes.set(
        ylabel="recovery of the teacher's score (%)",
        ylim=(0, 100 * top * 1.08),
        xlim=(-0.55, len(groups) - 0.45),
    )
    axes.set_xticks(range(len(groups)), labels)
    axes.grid(visible=False, axis="x")
    _legend(figure, axes)
    shown = ", ".join(
        f"{c.name} {100 * c.mean_recovery:.0f} %"
        for c in comparisons
        if c.mean_recovery is not None
    )
    return _svg(figure, "recovery", f"Mean recovery by domain. Over all tasks: {shown}.")


def gate_figure(name: str, gates: Sequence[Sequence[float]], key: str) -> str:
    """Draw mean output gates, layers by heads: 0 is window attention alone, 1 the mLSTM alone."""
    import numpy as np

    values = np.asarray(gates, dtype=float)  # (L, H)
    layers, heads = values.shape
    figure, axes = _figure(min(7.6, 1.6 + 0.62 * heads), min(7.0, 1.1 + 0.42 * layers))
    mesh = axes.pcolormesh(
        values,
        vmin=0.0,
        vmax=1.0,
        cmap="cividis",
        rasterized=values.size > RASTER_CELLS,
        edgecolors="none",
    )
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set(xlabel="head", ylabel="layer")
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        step = max(1, count // 8)
        axis.set_ticks(
            [i + 0.5 for i in range(0, count, step)], [str(i) for i in range(0, count, step)]
        )
    if values.size <= 96:
        for (layer, head), value in np.ndenumerate(values):
            tone = "#ffffff" if value < 0.55 else "#111111"
            axes.text(
                head + 0.5,
                layer + 0.5,
                f"{value:.2f}",
                ha="center",
                va="center",
                color=tone,
                fontsize=9,
            )
    bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.04, ticks=[0, 0.5, 1])
    bar.ax.tick_params(colors=MUTED, length=0)
    bar.outline.set_visible(False)
    return _svg(
        figure,
        key,
        f"Mean output gate of {name}, {layers} layers by {heads} heads, mean {values.mean():.2f}.",
    )


def loss_figure(
    stage: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float], str]], key: str
) -> str:
    """Draw one stage's curves over steps, each (steps, values, unit); logarithmic where all values are positive."""
    figure, axes = _figure(4.6, 2.9)
    positive = True
    for index, (name, (steps, values, _)) in enumerate(curves.items()):
        stride = max(1, len(steps) // MAX_POINTS)
        positive = positive and all(value > 0 for value in values)
        axes.plot(
            steps[::stride],
            values[::stride],
            color=SERIES[index % len(SERIES)],
            lw=1.7,
            ls=DASHES[index % len(DASHES)] if len(curves) > 1 else "-",
            label=name,
        )
    if positive and any(len(values) for _, values, _ in curves.values()):
        axes.set_yscale("log")
        axes.minorticks_off()
        _plain_log_ticks(axes)
    units = list(dict.fromkeys(unit for _, _, unit in curves.values() if unit))
    axes.set(xlabel="step", ylabel=", ".join(units) or "loss")
    axes.margins(x=0.02)
    if len(curves) > 1:
        _legend(figure, axes, columns=min(3, len(curves)))
    last = ", ".join(
        f"{name} {values[-1]:.3g}" for name, (_, values, _) in curves.items() if len(values)
    )
    return _svg(figure, key, f"Loss of {stage} over steps. Last values: {last}.")


def _plain_log_ticks(axes: Axes) -> None:
    """Label a logarithmic axis with plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    low, high = axes.get_ylim()
    if high / low < 5:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.yaxis.set_major_locator(
            LogLocator(10, subs=(1, 2, 5) if high / low < 100 else (1,), numticks=8)
        )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.tick_params(colors=MUTED, length=0, labelsize=10, pad=6)
    axes.xaxis.label.set(color=MUTED, fontsize=10.5)
    axes.yaxis.label.set(color=MUTED, fontsize=10.5)
    axes.grid(color=GRID, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(
    figure: Figure, axes: Axes, columns: int | None = None, order: Sequence[str] = ()
) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if order:
        pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: order.index(pair[1]))
        handles, labels = [handle for handle, _ in pairs], [label for _, label in pairs]
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns or min(5, len(labels)),
        frameon=False,
        labelcolor=INK,
        fontsize=10,
        handlelength=2.2,
        columnspacing=1.5,
        borderaxespad=0.2,
    )


def _svg(figure: Figure, key: str, alt: str) -> str:
    """Render to SVG for a page: no prolog, own ids, the page's colours and font, an accessible name."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in a name is a dollar
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "text.parse_math": False}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    svg = re.sub(r"font: ((?:\S+ )*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", svg)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = html.escape(alt, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
