"""Names beside points, moved up or down where they would lie on each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from xlstm_eval.report.figures.style import MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 9.0
LETTER, LINE = 0.62, 1.25
"""Width of a letter and height of a line, in font sizes: the reader's font decides them."""
GAP = 7.0
"""Points (1/72 inch) between a point and its name."""
RAISED = 6.0
"""How far a name stands above its point, so that a line through the point does not cross it."""
MARK = 5.0
"""Half the size of a point's mark, with some air."""
STEP = 3.0
MOST_STEPS = 30
"""An axis becomes at most four times as wide; a name that has no room then is cut by the page."""
LONGEST = 34
"""Letters of a name; a longer one loses its beginning, which names of runs share."""


@dataclass(frozen=True)
class Box:
    """Hold a rectangle in points from the figure's lower left corner."""

    left: float
    low: float
    right: float
    high: float

    def meets(self, other: Box) -> bool:
        """Tell whether two rectangles share more than an edge."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.low < other.high
            and other.low < self.high
        )


def make_room(axes: Axes, labels: Mapping[tuple[float, float], tuple[str, str]]) -> None:
    """Widen a logarithmic x-axis to the right until each name fits beside its point."""
    figure = _figure(axes)
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    width = (frame.x1 - frame.x0) * 72 / figure.dpi
    low, high = (math.log(end) for end in axes.get_xlim())
    wider = (high - low) / 10
    shares = [(math.log(x), (_width(text) + GAP) / width) for (x, _), (text, _) in labels.items()]

    def fits(at: float, share: float) -> bool:
        left, right = (at - low) / (high - low), (high - at) / (high - low)
        return max(left, right) >= share

    for _ in range(MOST_STEPS):
        if all(fits(*own) for own in shares):
            break
        high += wider
    axes.set_xlim(math.exp(low), math.exp(high))


def place_labels(
    axes: Axes,
    labels: Mapping[tuple[float, float], tuple[str, str]],
    marks: Sequence[tuple[float, float]],
) -> None:
    """Write names beside their points: ``labels`` maps a place to a text and its colour.

    ``marks`` are all points of the figure, which names keep off. The axes' limits must be final. A
    name that had to move is joined to its point by a line.
    """
    figure = _figure(axes)
    # The layout decides where points are; names come after it and do not change it.
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    frame = axes.get_window_extent()
    inside = Box(*(scale * edge for edge in frame.extents))

    def spot(place: tuple[float, float]) -> tuple[float, float]:
        x, y = axes.transData.transform(place)
        return scale * x, scale * y

    taken = [Box(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in (spot(mark) for mark in marks)]
    # From below, so that what is crowded moves up, where there is room.
    for place in sorted(labels, key=lambda place: (spot(place)[1], spot(place)[0])):
        text, color = labels[place]
        text = _shortened(text)
        box, to_left = _free_box(spot(place), text, inside, taken)
        taken.append(box)
        _write(axes, place, spot(place), box, to_left, text, color)


def _figure(axes: Axes) -> Figure:
    # No part of a figure, whose type the attribute allows too.
    return cast("Figure", axes.figure)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else "…" + text[1 - LONGEST :]


def _width(text: str) -> float:
    return LETTER * SIZE * len(_shortened(text))


def _free_box(
    spot: tuple[float, float], text: str, inside: Box, taken: Sequence[Box]
) -> tuple[Box, bool]:
    """Return the nearest free place of a name, and whether it is left of its point."""
    found = list(_boxes(spot, text, inside))
    free = (entry for entry in found if not any(entry[0].meets(other) for other in taken))
    return next(free, found[0])


def _boxes(spot: tuple[float, float], text: str, inside: Box) -> Iterator[tuple[Box, bool]]:
    """Yield places of a name that lie in the axes, the nearest first."""
    x, y = spot
    width, height = _width(text), LINE * SIZE
    room = inside.high - inside.low
    right = Box(x + GAP, 0, x + GAP + width, 0)
    left = Box(x - GAP - width, 0, x - GAP, 0)
    # A name that fits on neither side stays right, where the page shows most of it.
    sides = [
        side for side in (right, left) if inside.left <= side.left and side.right <= inside.right
    ]
    for number in range(int(2 * room / STEP)):
        for sign in (1, -1):
            middle = y + RAISED + sign * number * STEP
            low, high = middle - height / 2, middle + height / 2
            if inside.low <= low and high <= inside.high + height:
                for side in sides or [right]:
                    yield Box(side.left, low, side.right, high), side is left
    yield Box(right.left, y, right.right, y + height), False


def _write(
    axes: Axes,
    place: tuple[float, float],
    spot: tuple[float, float],
    box: Box,
    to_left: bool,
    text: str,
    color: str,
) -> None:
    middle = (box.low + box.high) / 2 - spot[1]
    moved = abs(middle - RAISED) > STEP
    # From the end of the text that is next to the point, to the edge of its mark.
    line = {"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkA": 1, "shrinkB": 4}
    line["relpos"] = (1.0, 0.5) if to_left else (0.0, 0.5)
    note = axes.annotate(
        text,
        place,
        xytext=(-GAP if to_left else GAP, middle),
        textcoords="offset points",
        ha="right" if to_left else "left",
        va="center",
        fontsize=SIZE,
        color=color,
        arrowprops=line if moved else None,
    )
    note.set_in_layout(False)
