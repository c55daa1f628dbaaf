"""The style of the report's figures: inline SVG, the same bytes for the same data.

Colours are CSS variables of the page (templates/style.css.j2), so one figure serves light and
dark mode. The palette is Okabe and Ito's, which people with colour blindness can tell apart; line
styles differ as well.
"""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
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


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure and its axes in the page's style (sizes in inches)."""
    figure, grid = new_grid(width, height, 1, 1)
    return figure, grid[0][0]


def new_grid(
    width: float, height: float, rows: int, columns: int
) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure with a grid of axes, row by row."""
    from matplotlib.figure import Figure

    # Not pyplot: it keeps every figure it makes, and looks for a display.
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        _dress(axes)
    return figure, [list(line) for line in grid]


def _dress(axes: Axes) -> None:
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.tick_params(colors=MUTED, length=0, labelsize=10, pad=6)
    axes.xaxis.label.set(color=MUTED, fontsize=10.5)
    axes.yaxis.label.set(color=MUTED, fontsize=10.5)
    axes.grid(color=GRID, lw=0.8, zorder=0)
    axes.set_axisbelow(True)


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    low, high = axis.get_view_interval()
    if high / low < 5:
        axis.set_major_locator(MaxNLocator(5))
    else:
        subs = (1, 2, 5) if high / low < 100 else (1,)
        axis.set_major_locator(LogLocator(10, subs=subs, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


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
