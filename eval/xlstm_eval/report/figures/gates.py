"""Output gates of all models as one picture of small heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xlstm_eval.report.figures.style import INK, MUTED, new_grid, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RASTER_CELLS = 600
"""With more cells in all, maps are drawn as bitmaps: a rectangle each would make the page large."""
LABELLED_CELLS = 32
"""Cells up to which each has its value written in it."""
COLUMNS = 2


def gates_figure(gates: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """Draw mean output gates of each model, layers by heads, on one scale.

    0 is window attention alone, 1 the mLSTM alone; None, a head that keeps full attention, is
    blank.
    """
    import numpy as np

    maps = {name: np.asarray(rows, dtype=float) for name, rows in gates.items()}  # each (L, H)
    columns = min(COLUMNS, len(maps))
    rows = math.ceil(len(maps) / columns)
    tallest = max(values.shape[0] for values in maps.values())
    height = min(3.4, 0.75 + 0.3 * tallest)
    figure, grid = new_grid(1.2 + 2.2 * columns, 0.35 + height * rows, rows, columns)
    raster = sum(values.size for values in maps.values()) > RASTER_CELLS
    mesh: Any = None
    for index, (name, values) in enumerate(maps.items()):
        axes = grid[index // columns][index % columns]
        # A fixed scale from 0 to 1, so that the maps of several models can be compared.
        scale: dict[str, Any] = {"vmin": 0.0, "vmax": 1.0, "cmap": "cividis"}
        mesh = axes.pcolormesh(values, rasterized=raster, edgecolors="none", **scale)
        _label_axes(axes, name, values.shape, is_left=index % columns == 0)
        if values.size <= LABELLED_CELLS:
            _label_cells(axes, values)
    for index in range(len(maps), rows * columns):
        grid[index // columns][index % columns].set_visible(False)
    shown = [axes for line in grid for axes in line]
    bar = figure.colorbar(mesh, ax=shown, fraction=0.03, pad=0.02, ticks=[0, 0.5, 1])
    bar.ax.tick_params(colors=MUTED, length=0)
    bar.outline.set_visible(False)
    means = ", ".join(f"{name} {np.nanmean(values):.2f}" for name, values in maps.items())
    return to_svg(figure, "gates", f"Mean output gates, layers by heads. Means: {means}.")


def _label_axes(axes: Axes, name: str, shape: tuple[int, ...], *, is_left: bool) -> None:
    """Write the model's name, and number some layers and heads; layer 0 is at the top."""
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_title(name, loc="left", color=INK, fontsize=10)
    axes.set_xlabel("head")
    if is_left:
        axes.set_ylabel("layer")
    for axis, count in ((axes.yaxis, shape[0]), (axes.xaxis, shape[1])):
        shown = range(0, count, max(1, count // 8))
        axis.set_ticks([i + 0.5 for i in shown], [str(i) for i in shown])


def _label_cells(axes: Axes, values: Any) -> None:
    """Write each gate into its cell, in the tone that reads on the cell's colour."""
    for layer, row in enumerate(values):
        for head, value in enumerate(row):
            if value != value:  # no gate
                continue
            tone = "#ffffff" if value < 0.55 else "#111111"
            x, y = head + 0.5, layer + 0.5
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=tone, fontsize=8)
