"""Figures of the report as inline SVG: pure functions, the same bytes for the same data.

Colours are CSS variables of the page (templates/report.html.j2), so one figure serves light and
dark mode. The palette is Okabe and Ito's, which people with colour blindness can tell apart; line
styles differ as well.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xlstm_eval.metrics import required_tolerance
from xlstm_eval.records import Comparison
from xlstm_eval.report.sentence import SIGNIFICANT
from xlstm_eval.score import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib takes colours only. It draws with these stand-ins, which to_svg replaces by variables.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0500{index:02x}" for index in range(8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
_VARIABLES |= {color: f"--c{index}" for index, color in enumerate(SERIES)}
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.4)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1.5)),
    (0, (8, 2)),
)
RASTER_CELLS = 600
"""A heat map with more cells is drawn as a bitmap: a rectangle each would make the page large."""
LABELLED_CELLS = 96
MAX_POINTS = 400


def win_and_tie_figure(comparisons: Sequence[Comparison], merged: str) -> str:
    """Draw C_alpha over alpha as an exact step function, the headline model's line thick.

    The band is the headline's 95 % interval, where its tasks have items.
    """
    figure, axes = new_figure(5.7, 3.9)
    limit = _tolerance_limit(comparisons)
    # C = 0.5 defines the critical tolerance (paper, section on the metric).
    axes.axhline(0.5, color=MUTED, lw=0.9, ls=(0, (2, 3)))
    axes.text(limit, 0.485, "C = 0.5", color=MUTED, fontsize=9, ha="right", va="top")
    for index, result in enumerate(comparisons):
        is_headline = result.name == merged
        if is_headline:
            _win_and_tie_band(axes, index, result, limit)
        _win_and_tie_line(axes, index, result, limit, is_headline)
    axes.set(xlim=(0, limit), ylim=(0, 1.02), xlabel="tolerance α", ylabel="Win-and-Tie rate C(α)")
    draw_legend(figure, axes)
    rates = []
    for result in comparisons:
        rate = result.win_and_tie.get("0.05", float("nan"))
        rates.append(f"{result.name}: C(0.05) {rate:.2f}")
    return to_svg(figure, "wat", f"Win-and-Tie rate over tolerance. {', '.join(rates)}.")


def _tolerance_limit(comparisons: Sequence[Comparison]) -> float:
    """Return where the axis of tolerances ends: behind all critical tolerances, at 1 at most."""
    # A student that loses nothing anywhere still needs an axis.
    largest = max(result.critical_tolerance_75 for result in comparisons)
    limit = max(0.1, 1.15 * largest)
    return min(1.0, round(limit + 0.05, 1))


def _win_and_tie_band(axes: Axes, index: int, result: Comparison, limit: float) -> None:
    """Shade between the ends of the intervals of C_alpha, which are step functions too."""
    bands = result.statistics.sorted_losses if result.statistics else None
    if bands is None:
        return
    ends = sorted({0.0, limit, *(end for band in bands for end in band if 0 < end < limit)})
    surely = [sum(high <= at for _, high in bands) / len(bands) for at in ends]
    perhaps = [sum(low <= at for low, _ in bands) / len(bands) for at in ends]
    color = SERIES[index % len(SERIES)]
    axes.fill_between(ends, surely, perhaps, step="post", color=color, alpha=0.16, lw=0, zorder=1)


def _win_and_tie_line(
    axes: Axes, index: int, result: Comparison, limit: float, is_headline: bool
) -> None:
    """Draw one model's steps; the headline model also gets a dot at its critical tolerance."""
    steps = sorted(float(required_tolerance(pair)) for pair in result.counted())

    def rate(tolerance: float) -> float:
        # Without a task that counts nothing wins.
        return sum(step <= tolerance for step in steps) / max(1, len(steps))

    color = SERIES[index % len(SERIES)]
    # The rate jumps at each task's required tolerance and holds until the next ("steps-post").
    # Unclipped, a thick line at 1.0 keeps its full width.
    x = [0.0, *(step for step in steps if step < limit), limit]
    axes.plot(
        x,
        [rate(at) for at in x],
        drawstyle="steps-post",
        color=color,
        lw=3.2 if is_headline else 1.5,
        ls="-" if is_headline else DASHES[index % len(DASHES)],
        label=result.name,
        zorder=4 if is_headline else 3,
        clip_on=False,
        solid_joinstyle="miter",
    )
    critical = result.critical_tolerance
    if is_headline and critical <= limit:
        height = rate(critical)
        style: dict[str, Any] = {"ms": 8, "color": color, "mec": PAPER, "mew": 1.6, "zorder": 6}
        axes.plot([critical], [height], "o", clip_on=False, **style)


def difference_figure(result: Comparison, short: Mapping[str, str]) -> str:
    """Draw each task's difference to the teacher with its interval, the largest loss first.

    In points; where scores are no shares, in percent of the teacher's. Filled dots are differences
    that noise does not explain (Holm's correction).
    """
    assert result.statistics is not None
    rows = []
    for pair in result.counted():
        found = result.statistics.tasks.get(pair.task)
        if found is None or found.difference_interval is None:
            continue
        is_share = pair.higher_is_better and max(pair.teacher, pair.student) <= 1
        scale = 100 / (1.0 if is_share else pair.teacher or 1.0)
        low, high = found.difference_interval
        values = (scale * found.difference, scale * low, scale * high)
        label = short[pair.task] if is_share else f"{short[pair.task]} (% of the teacher's)"
        rows.append((*values, label, found.p_value_holm <= SIGNIFICANT))
    rows.sort(key=lambda row: (row[0], row[3]))
    figure, axes = new_figure(6.6, 0.9 + 0.26 * len(rows))
    axes.axvline(0, color=INK, lw=1.1, zorder=2)
    for place, (middle, low, high, _, is_shown) in enumerate(rows):
        color = MUTED if not is_shown else SERIES[1] if middle < 0 else SERIES[0]
        axes.plot([low, high], [place, place], color=color, lw=1.8, zorder=3)
        face = color if is_shown else PAPER
        axes.plot([middle], [place], "o", ms=6.5, color=color, mfc=face, mew=1.6, zorder=4)
    axes.set_yticks(range(len(rows)), [row[3] for row in rows])
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="student minus teacher, points (95 % interval)")
    axes.grid(visible=False, axis="y")
    shown = sum(row[4] for row in rows)
    alt = f"Differences of {len(rows)} tasks with intervals; {shown} beyond noise."
    return to_svg(figure, "differences", alt)


def recovery_figure(comparisons: Sequence[Comparison], merged: str) -> str:
    """Draw mean recovery per domain, a bar for each model; the line at 100 % is the teacher."""
    groups = [*comparisons[0].recovery_by_domain, "all tasks"]
    figure, axes = new_figure(5.7, 3.9)
    width = 0.8 / len(comparisons)
    highest, labels = 100.0, groups
    for index, result in enumerate(comparisons):
        rates = [*result.recovery_by_domain.values(), result.mean_recovery]
        places, heights = [], []
        for group, rate in enumerate(rates):
            # No bar where every task of a domain has a teacher's score of 0: there is no rate.
            if rate is not None:
                places.append(group - 0.4 + width * (index + 0.5))
                heights.append(100 * rate)
        highest = max([highest, *heights])
        is_headline = result.name == merged
        axes.bar(
            places,
            heights,
            width * 0.88,
            color=SERIES[index % len(SERIES)],
            alpha=1.0 if is_headline else 0.62,
            label=result.name,
            zorder=3,
        )
        if is_headline:
            pairs = zip(groups, rates, strict=True)
            labels = [f"{group}\n{percent(rate)}" for group, rate in pairs]
    axes.axhline(100, color=INK, lw=1.1, ls=(0, (4, 3)), zorder=4)
    axes.set(ylabel="recovery of the teacher's score (%)", ylim=(0, highest * 1.08))
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.set_xticks(range(len(groups)), labels)
    axes.grid(visible=False, axis="x")
    draw_legend(figure, axes)
    shown = [
        f"{result.name} {100 * result.mean_recovery:.0f} %"
        for result in comparisons
        if result.mean_recovery is not None
    ]
    alt = f"Mean recovery by domain. Over all tasks: {', '.join(shown)}."
    return to_svg(figure, "recovery", alt)


def gate_figure(name: str, gates: Sequence[Sequence[float]], key: str) -> str:
    """Draw mean output gates, layers by heads: 0 is window attention alone, 1 the mLSTM alone."""
    import numpy as np

    values = np.asarray(gates, dtype=float)  # (L, H)
    layers, heads = values.shape
    figure, axes = new_figure(min(7.6, 1.6 + 0.62 * heads), min(7.0, 1.1 + 0.42 * layers))
    mesh = axes.pcolormesh(
        values,
        # A fixed scale from 0 to 1, so that the maps of several models can be compared.
        vmin=0.0,
        vmax=1.0,
        cmap="cividis",
        rasterized=values.size > RASTER_CELLS,
        edgecolors="none",
    )
    axes.invert_yaxis()  # layer 0 at the top
    axes.grid(visible=False)
    axes.set(xlabel="head", ylabel="layer")
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        shown = range(0, count, max(1, count // 8))
        axis.set_ticks([i + 0.5 for i in shown], [str(i) for i in shown])
    if values.size <= LABELLED_CELLS:
        _label_cells(axes, values)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.04, ticks=[0, 0.5, 1])
    bar.ax.tick_params(colors=MUTED, length=0)
    bar.outline.set_visible(False)
    size = f"{layers} layers by {heads} heads"
    return to_svg(figure, key, f"Mean output gate of {name}, {size}, mean {values.mean():.2f}.")


def _label_cells(axes: Axes, values: Any) -> None:
    """Write each gate into its cell, in the tone that reads on the cell's colour."""
    for layer, row in enumerate(values):
        for head, value in enumerate(row):
            tone = "#ffffff" if value < 0.55 else "#111111"
            x, y = head + 0.5, layer + 0.5
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=tone, fontsize=9)


Series = tuple[Sequence[float], Sequence[float], str]
"""Steps, values, unit."""


def loss_figure(stage: str, curves: Mapping[str, Series], key: str) -> str:
    """Draw one stage's curves over steps; logarithmic where all values are positive."""
    figure, axes = new_figure(4.6, 2.9)
    several = len(curves) > 1
    for index, (name, (steps, values, _)) in enumerate(curves.items()):
        stride = max(1, len(steps) // MAX_POINTS)
        axes.plot(
            steps[::stride],
            values[::stride],
            color=SERIES[index % len(SERIES)],
            lw=1.7,
            ls=DASHES[index % len(DASHES)] if several else "-",
            label=name,
        )
    # A loss falls fast and then slowly; an axis of logarithms shows both.
    lowest = [min(values) for _, values, _ in curves.values() if values]
    if lowest and min(lowest) > 0:
        axes.set_yscale("log")
        axes.minorticks_off()
        _plain_log_ticks(axes)
    units = dict.fromkeys(unit for _, _, unit in curves.values() if unit)
    axes.set(xlabel="step", ylabel=", ".join(units) or "loss")
    axes.margins(x=0.02)
    if several:
        draw_legend(figure, axes, columns=min(3, len(curves)))
    last = [f"{name} {values[-1]:.3g}" for name, (_, values, _) in curves.items() if values]
    return to_svg(figure, key, f"Loss of {stage} over steps. Last values: {', '.join(last)}.")


def _plain_log_ticks(axes: Axes) -> None:
    """Label a logarithmic axis with plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    low, high = axes.get_ylim()
    if high / low < 5:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        subs = (1, 2, 5) if high / low < 100 else (1,)
        axes.yaxis.set_major_locator(LogLocator(10, subs=subs, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure and its axes in the page's style (sizes in inches)."""
    from matplotlib.figure import Figure

    # Not pyplot: it keeps every figure it makes, and looks for a display.
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


def draw_legend(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    """Put the legend above the axes."""
    handles, labels = axes.get_legend_handles_labels()
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


def to_svg(figure: Figure, key: str, alt: str) -> str:
    """Render to SVG for a page: own ids, the page's colours and font, an accessible name.

    ``key`` makes the ids unique on the page; ``alt`` is the text for readers without the figure.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in a name is a dollar
    buffer = io.StringIO()
    # Text stays text and takes the page's font; a fixed salt gives the same ids each time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "text.parse_math": False}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    svg = re.sub(r"font: ((?:\S+ )*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", svg)
    # All figures stand in one page, and references go by id: equal ids would mix them up.
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    # Without a size of its own the figure fills the width that the page gives it.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = html.escape(alt, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
