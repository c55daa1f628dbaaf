"""The report of a run: one HTML file that needs nothing else, the same in Markdown and in JSON."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlstm_eval.records import Comparison, TaskPair, TaskResult
from xlstm_eval.report.data import HEADLINE_ALPHA, Curve, ReportData, ReportModel
from xlstm_eval.report.environment import environment, write_files
from xlstm_eval.report.items import LONGEST_TEXT, OUTCOMES, page_values, script_json
from xlstm_eval.report.merging import Merging, merging_of, merging_sentence
from xlstm_eval.report.names import short_names
from xlstm_eval.report.sentence import sentence
from xlstm_eval.report.speed import TEACHER, speed_sentence
from xlstm_eval.report.values import report_values

__all__ = ["Curve", "ReportData", "ReportModel", "render", "write_report"]

OUTCOME_LABELS = dict(
    zip(OUTCOMES, ("teacher only", "student only", "neither", "both"), strict=True)
)
FULL_SHADE = 0.3
"""How far a score must be from its teacher's to be shaded most strongly in the table."""


def write_report(data: ReportData, directory: str | Path) -> Path:
    """Write report.html, report.md and report.json; return the path of the HTML file.

    All or nothing: a folder beside ``directory`` is filled, which then takes its place.
    """
    return write_files(render(data), Path(directory)) / "report.html"


def render(data: ReportData) -> dict[str, str]:
    """Return the report's files by name; the same text for the same data."""
    comparisons = data.comparisons()
    merging = merging_of(data)
    context = _context(data, comparisons, merging)
    figures = _figures(data, comparisons, merging)
    made = environment()
    page = made.get_template("report.html.j2").render(context, figures=figures, **_script(data))
    text = made.get_template("report.md.j2").render(context)
    values = report_values(data, comparisons, merging).model_dump(mode="json")
    return {
        "report.html": page,
        "report.md": text,
        # Without NaN: JSON has none, and scripts read this file.
        "report.json": json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False),
    }


def _script(data: ReportData) -> dict[str, Any]:
    """Return the page's script, what it reads, and the hash by which browsers allow it alone."""
    from markupsafe import Markup

    script = (Path(__file__).parent / "templates" / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    items = None
    if data.items:
        items = Markup(script_json(page_values(data.items, data.teacher_results)))
    return {"script": Markup(script), "script_hash": Markup(f"sha256-{digest}"), "items": items}


def _context(
    data: ReportData, comparisons: Sequence[Comparison], merging: Merging | None
) -> dict[str, Any]:
    headline = data.headline().name
    by_name = {result.name: result for result in comparisons}
    stages = _stage_times(data.timings)
    longest = max((seconds for seconds, _ in stages.values()), default=0.0)
    return {
        "data": data,
        "headline": by_name[headline],
        "headline_alpha": str(HEADLINE_ALPHA),
        "comparisons": comparisons,
        "roles": {model.name: model.role for model in data.models},
        "domains": _by_domain(data.teacher_results, comparisons),
        "short": _short(data),
        "total_seconds": sum(data.timings.values()),
        "stages": stages,
        "longest": longest,
        "item_count": sum(result.samples for result in data.teacher_results),
        "sentence": sentence(by_name[headline]),
        "merging": merging,
        "merging_sentence": merging_sentence(merging) if merging else "",
        "speed": _shown_speed(data),
        "speed_sentence": speed_sentence(data.speed, headline),
        "long_context": _shown_long_context(data),
        "outcome_labels": OUTCOME_LABELS,
        "longest_text": LONGEST_TEXT,
    }


def _short(data: ReportData) -> dict[str, str]:
    return short_names({result.task: result.domain for result in data.teacher_results})


def _by_domain(
    results: Sequence[TaskResult], comparisons: Sequence[Comparison]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows of the score table by domain: a task, and a cell for each student."""
    rows: list[dict[str, Any]] = [
        {"task": result, "cells": [_cell(own, own.tasks[index]) for own in comparisons]}
        for index, result in enumerate(results)
    ]
    grouped = itertools.groupby(rows, key=lambda row: row["task"].domain or "-")
    return [(domain, list(own)) for domain, own in grouped]


def _cell(result: Comparison, pair: TaskPair) -> dict[str, Any]:
    """Return a cell of the table: score, recovery, side of the teacher, strength of shading."""
    rate = result.recovery[pair.task]
    side, strength = "none", 0.0
    # Without a rate (the teacher's score is 0) a cell has no side and no shade.
    if rate is not None:
        side = "above" if rate >= 1 else "below"
        strength = min(1.0, abs(rate - 1) / FULL_SHADE)
    return {
        "score": pair.student,
        "stderr": pair.student_stderr,
        "recovery": rate,
        "side": side,
        "strength": strength,
    }


def _stage_times(timings: Mapping[str, float]) -> dict[str, tuple[float, dict[str, float]]]:
    """Return each stage's total and its parts; "distill/math" is a part of "distill"."""
    stages: dict[str, tuple[float, dict[str, float]]] = {}
    for label, seconds in timings.items():
        stage, _, part = label.partition("/")
        total, parts = stages.get(stage, (0.0, {}))
        if part:
            parts[part] = seconds
        stages[stage] = (total + seconds, parts)
    return stages


def _shown_speed(data: ReportData) -> list[tuple[int, list[Any]]]:
    """Return a row for each context: what each model was measured at, or None."""
    contexts = {point.context for speed in data.speed.values() for point in speed.points}
    return [
        (context, [speed.at(context) for speed in data.speed.values()])
        for context in sorted(contexts)
    ]


def _shown_long_context(data: ReportData) -> dict[str, Any]:
    """Return the teacher's and the headline's long-context results, where items are the same."""
    names = [TEACHER, data.headline().name]
    found = {name: data.long_context[name] for name in names if name in data.long_context}
    if len({own.items for own in found.values()}) > 1:
        # Other items: nothing to compare. The teacher's alone say nothing of the student.
        return {names[1]: found[names[1]]}
    return found


def _figures(
    data: ReportData, comparisons: Sequence[Comparison], merging: Merging | None
) -> dict[str, Any]:
    """Draw every figure, as markup that the template places as it is."""
    # Markup is not escaped again. That is safe: the figures escape every name they write.
    from markupsafe import Markup

    # matplotlib takes a second to import.
    from xlstm_eval.report.figures import costs, distance, gates, scores

    headline = data.headline().name
    shown = next(result for result in comparisons if result.name == headline)
    short = _short(data)
    names = ("differences", "merging", "memory", "rate", "recall", "position", "gates")
    found: dict[str, str | None] = dict.fromkeys(names) | {
        "win_and_tie": scores.win_and_tie_figure(comparisons, headline),
        "recovery": scores.recovery_figure(comparisons, headline),
    }
    if shown.statistics is not None and shown.statistics.tasks:
        found["differences"] = scores.difference_figure(shown, short, "differences")
    if merging and merging.comparison.statistics and merging.comparison.statistics.tasks:
        labels = {task: f"{short[task]} ({expert})" for task, expert in merging.experts.items()}
        found["merging"] = scores.difference_figure(merging.comparison, labels, "merging", "expert")
    if data.speed:
        found["memory"] = costs.memory_figure(data.speed)
        found["rate"] = costs.rate_figure(data.speed)
    long_context = _shown_long_context(data)
    if long_context:
        found["recall"] = distance.recall_figure(long_context)
        found["position"] = distance.position_figure(long_context)
    if data.gates:
        found["gates"] = gates.gates_figure(data.gates)
    drawn: dict[str, Any] = {name: svg and Markup(svg) for name, svg in found.items()}
    drawn["losses"] = {stage: Markup(svg) for stage, svg in _loss_figures(data).items()}
    return drawn


def _loss_figures(data: ReportData) -> dict[str, str]:
    from xlstm_eval.report.figures.curves import Series, loss_figure

    found = {}
    for index, (stage, curves) in enumerate(data.losses.items()):
        series = {
            name: Series(curve.step, curve.value, curve.unit, (curve.held_out_step, curve.held_out))
            for name, curve in curves.items()
            if curve.step
        }
        if series:
            found[stage] = loss_figure(stage, series, f"loss{index}")
    return found
