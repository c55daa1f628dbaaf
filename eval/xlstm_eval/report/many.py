"""Many students side by side: runs, merges, experts, and published rows, on one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlstm_eval.report.entries import Entry, groups_of
from xlstm_eval.report.environment import environment, write_files
from xlstm_eval.report.sentence import sentence
from xlstm_eval.score import statistics_values

ALPHA = "0.05"
COSTS = {"state_bytes": "state of one sequence (bytes)", "tokens": "tokens trained"}
LOSSES = {"worst_drop": "worst drop", "critical_tolerance": "critical tolerance α*"}


def write_many(title: str, entries: Sequence[Entry], directory: Path) -> Path:
    """Write compare.html, compare.md and compare.json; return the path of the HTML file."""
    return write_files(render_many(title, entries), directory) / "compare.html"


def render_many(title: str, entries: Sequence[Entry]) -> dict[str, str]:
    """Return the files by name; the same text for the same entries."""
    from markupsafe import Markup

    from xlstm_eval.report.figures.pareto import pareto_figure  # matplotlib takes a second

    figures = {}
    for cost, label in COSTS.items():
        for loss, name in LOSSES.items():
            drawn = pareto_figure(entries, cost, loss, (label, name))
            if drawn:
                figures[f"{name} against {label}"] = Markup(drawn)
    context = {
        "title": title,
        "entries": entries,
        "alpha": ALPHA,
        "figures": figures,
        "sources": list(dict.fromkeys(entry.source for entry in entries if entry.source)),
        "groups": groups_of(entries),
        "sentences": {
            entry.name: sentence(entry.comparison) for entry in entries if not entry.source
        },
    }
    made = environment()
    return {
        "compare.html": made.get_template("compare.html.j2").render(context),
        "compare.md": made.get_template("compare.md.j2").render(context),
        "compare.json": json.dumps(
            {"title": title, "students": [_values(entry) for entry in entries]},
            indent=1,
            ensure_ascii=False,
            allow_nan=False,
        ),
    }


def _values(entry: Entry) -> dict[str, Any]:
    result = entry.comparison
    return {
        **entry.model_dump(mode="json", exclude={"comparison"}),
        "scores": {pair.task: pair.student for pair in result.tasks},
        "teacher_scores": {pair.task: pair.teacher for pair in result.tasks},
        "win_and_tie": result.win_and_tie,
        "critical_tolerance": result.critical_tolerance,
        "critical_tolerance_75": result.critical_tolerance_75,
        "mean_recovery": result.mean_recovery,
        "worst_drop": result.worst_drop,
        "worst_task": result.worst_task,
        "lossless": result.lossless,
        "apart": result.apart,
        **statistics_values(result),
    }
