"""Draw a report's scores as one small picture, for a README.

``python -m xlstm_eval.report.picture REPORT.json PICTURE.svg`` reads what a run left in
``RUN/report/report.json``. The same report gives the same bytes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from xlstm_eval.metrics import win_or_tie
from xlstm_eval.records import EvalError, TaskPair
from xlstm_eval.report.names import short_names
from xlstm_eval.score import percent

# A picture in a README has no page whose colours it could take. So it brings its own light card,
# which reads well on a light and on a dark page. The hues are Okabe and Ito's, as in the report.
CARD, BORDER, PANEL = "#ffffff", "#d5dae1", "#e8ebf0"
INK, MUTED = "#15181d", "#5b6472"
TEACHER, STUDENT, LOSS = "#5b6472", "#0072b2", "#d55e00"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

WIDTH, MARGIN, GAP = 880, 28, 36
COLUMNS = 2
CLOSE = 0.05
"""The tolerance up to which a student's score counts as close to its teacher's."""
PANEL_WIDTH = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
LABELS, NUMBERS = 92, 104
"""Widths to the left and to the right of a panel's axis, for task names and scores."""
HEAD, ROW, PANEL_HEAD, AXIS, FOOTNOTE = 116, 25, 30, 30, 22
LETTER = 6.9
"""About the width of a letter of the key; the viewer's font decides the true one."""


@dataclass(frozen=True)
class Row:
    """Hold one task: both scores in [0, 1], the student's standard error, whether it is close."""

    name: str
    teacher: float
    student: float
    stderr: float
    close: bool


@dataclass(frozen=True)
class Scale:
    """Map scores to places on a panel's axis, which starts at ``low`` and ends at 1."""

    low: float
    left: float
    width: float

    def place(self, score: float) -> float:
        """Return the horizontal place of a score; what lies outside the axis goes to its end."""
        share = (score - self.low) / (1 - self.low)
        return self.left + self.width * min(1.0, max(0.0, share))

    def ticks(self) -> list[float]:
        """Return the scores to label: six at most, all tenths."""
        tenths = range(round(10 * self.low), 11)
        step = math.ceil(len(tenths) / 6)
        # From the end, so that 1.0 always has a label.
        return [tenth / 10 for tenth in tenths[::-1][::step]]


def draw(report: Mapping[str, Any]) -> str:
    """Return a picture (SVG) of a report.json: the teacher's and the student's score on each task.

    Tasks are grouped by domain. Tasks whose score is no share of right answers (a perplexity, say)
    have no place on the axis and are counted below. Raises EvalError: no task is left.
    """
    student = _headline(report["models"])
    domains = _rows(report, student)
    rows = [row for panel in domains.values() for row in panel]
    if not rows:
        raise EvalError(
            "tasks: none has scores between 0 and 1 where higher is better. Nothing to draw."
        )
    low = _axis_start(min(min(row.teacher, row.student - row.stderr) for row in rows))

    parts: list[str] = []
    top: float = HEAD
    names = list(domains)
    for start in range(0, len(names), COLUMNS):
        line = names[start : start + COLUMNS]
        for column, name in enumerate(line):
            left = MARGIN + column * (PANEL_WIDTH + GAP)
            parts += _panel(name, domains[name], left, top, low)
        tallest = max(len(domains[name]) for name in line)
        top += PANEL_HEAD + ROW * tallest + AXIS
    left_out = len(report["tasks"]) - len(rows)
    if left_out:
        note = f"Not shown: {left_out} tasks whose scores have no scale from 0 to 1."
        parts.append(_text(MARGIN, top + 6, note, size=12, color=MUTED))
        top += FOOTNOTE
    sentence = _summary(report, student)
    head = _head(report["title"], sentence, student["name"])
    return _document([*head, *parts], height=top + 10, alt=f"{report['title']}. {sentence}")


def _headline(models: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the merged student, else the first model, as the report does."""
    for model in models:
        if model["role"] == "merged":
            return model
    return models[0]


def _rows(report: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the tasks to draw, by domain and in the report's order."""
    teacher = report["teacher"]["scores"]
    short = short_names({name: task["domain"] for name, task in report["tasks"].items()})
    domains: dict[str, list[Row]] = {}
    for name, task in report["tasks"].items():
        stderr = student["stderr"][name] or 0.0
        pair = TaskPair(task=name, teacher=teacher[name], student=student["scores"][name])
        row = Row(short[name], pair.teacher, pair.student, stderr, win_or_tie(pair, CLOSE))
        # A score above 1 is a percentage or a perplexity, and has no place on an axis from 0 to 1.
        if task["higher_is_better"] and max(row.teacher, row.student) <= 1:
            domains.setdefault(task["domain"] or "tasks", []).append(row)
    return domains


def _axis_start(lowest: float) -> float:
    """Return the tenth below the lowest score, and at most 0.8: small differences look small."""
    return min(0.8, max(0.0, math.floor(10 * lowest) / 10))


def _summary(report: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    tasks = len(report["tasks"])
    # The rate is a share of all tasks, so the product is whole but for rounding.
    close = round(student["win_and_tie"][str(CLOSE)] * tasks)
    return (
        f"The student reaches at least {100 * (1 - CLOSE):.0f} % of its teacher's score on {close} "
        f"of {tasks} tasks, and {percent(student['mean_recovery'])} on average."
    )


def _head(title: str, sentence: str, student: str) -> list[str]:
    """Draw the title, what the figures say in a sentence, and the key."""
    key = (
        (_ring, TEACHER, "teacher"),
        (_dot, STUDENT, f"student ({student})"),
        (_dot, LOSS, f"student, more than {100 * CLOSE:.0f} % below"),
        (_error_bar, STUDENT, "± standard error"),
    )
    parts = [
        _text(MARGIN, 40, title, size=21, weight=650),
        _text(MARGIN, 64, sentence, size=14, color=MUTED),
    ]
    x, y = MARGIN + 7.0, 90.0
    for mark, color, label in key:
        parts += [mark(x, y, color), _text(x + 15, y + 4.5, label, size=13)]
        x += 15 + LETTER * len(label) + 30
    return parts


def _panel(name: str, rows: Sequence[Row], left: float, top: float, low: float) -> list[str]:
    """Draw one domain: its name, a row for each task, and the axis."""
    scale = Scale(low, left + LABELS, PANEL_WIDTH - LABELS - NUMBERS)
    right = left + PANEL_WIDTH
    first = top + PANEL_HEAD
    bottom = first + ROW * len(rows)
    parts = [_text(left, top + 16, name, size=14, weight=650)]
    parts += [
        _text(right - 54, top + 16, "teacher", size=11, color=MUTED, anchor="end"),
        _text(right, top + 16, "student", size=11, color=MUTED, anchor="end"),
    ]
    # Each panel has its own axis, so that a reader need not look across the picture.
    for tick in scale.ticks():
        x = scale.place(tick)
        parts.append(_line(x, first - 2, x, bottom, PANEL, 1))
        parts.append(_text(x, bottom + 15, f"{tick:.1f}", size=11, color=MUTED, anchor="middle"))
    for index, row in enumerate(rows):
        parts += _task(row, left, right, first + ROW * (index + 0.5), scale)
    return parts


def _task(row: Row, left: float, right: float, y: float, scale: Scale) -> list[str]:
    """Draw one task: name, error bar, the line between both scores, both marks, both numbers."""
    teacher, student = scale.place(row.teacher), scale.place(row.student)
    color = STUDENT if row.close else LOSS
    low, high = scale.place(row.student - row.stderr), scale.place(row.student + row.stderr)
    # In this order: the ring hides the end of the line, and the dot stays above both.
    return [
        _text(left, y + 4.5, row.name, size=13),
        _line(low, y, high, y, color, 6, opacity=0.22),
        _line(student, y, teacher, y, color, 2),
        _ring(teacher, y, TEACHER),
        _dot(student, y, color),
        _text(right - 54, y + 4.5, f"{row.teacher:.2f}", size=13, color=MUTED, anchor="end"),
        _text(right, y + 4.5, f"{row.student:.2f}", size=13, color=color, weight=600, anchor="end"),
    ]


def _ring(x: float, y: float, color: str) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="6"'
    return f'<circle {place} fill="{CARD}" stroke="{color}" stroke-width="2"/>'


def _dot(x: float, y: float, color: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{color}"/>'


def _error_bar(x: float, y: float, color: str) -> str:
    return _line(x - 9, y, x + 9, y, color, 6, opacity=0.22)


def _line(
    x1: float, y1: float, x2: float, y2: float, color: str, width: float, *, opacity: float = 1
) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
        f'stroke-width="{width}" stroke-opacity="{opacity}"/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    color: str = INK,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{color}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _document(parts: Sequence[str], height: float, alt: str) -> str:
    card = (
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="12" '
        f'fill="{CARD}" stroke="{BORDER}"/>'
    )
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img" aria-label="{escape(alt)}" '
        f'font-family="{escape(FONT)}">'
    )
    return "\n".join([opening, card, *parts, "</svg>"]) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Read a report.json and write its picture."""
    if len(arguments) != 2:
        raise SystemExit("usage: python -m xlstm_eval.report.picture REPORT.json PICTURE.svg")
    source, target = map(Path, arguments)
    try:
        picture = draw(json.loads(source.read_text(encoding="utf-8")))
    except EvalError as error:
        raise SystemExit(f"error: {source}: {error}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "it is no report.json"
        raise SystemExit(f"error: {source} cannot be drawn: {reason}.") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
