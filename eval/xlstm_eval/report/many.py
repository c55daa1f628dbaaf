"""Many students side by side: runs, merges, experts, and published rows, on one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from xlstm_eval.records import Comparison, Frozen, Name
from xlstm_eval.report.environment import environment, write_files
from xlstm_eval.report.sentence import sentence
from xlstm_eval.score import statistics_values

ALPHA = "0.05"
COSTS = {"state_bytes": "state of one sequence (bytes)", "tokens": "tokens trained"}
LOSSES = {"worst_drop": "worst drop", "critical_tolerance": "critical tolerance α*"}


class Entry(Frozen):
    """Hold one student of a page: its comparison with its own teacher, and what it costs.

    ``state_bytes`` is what decoding holds for a sequence of any length; ``tokens`` what alignment
    and distillation read. ``asked`` is the hash of all requests: rows with equal ones answered the
    same. ``source`` says where printed scores come from, ``printed_tolerance`` is the critical
    tolerance that the source prints.
    """

    name: Name
    role: Name
    teacher: Name
    comparison: Comparison
    state_bytes: int | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=0)
    asked: str = ""
    source: str = ""
    printed_tolerance: float | None = None


def write_many(title: str, entries: Sequence[Entry], directory: Path) -> Path:
    """Write compare.html, compare.md and compare.json; return the path of the HTML file."""
    return write_files(render_many(title, entries), directory) / "compare.html"


def render_many(title: str, entries: Sequence[Entry]) -> dict[str, str]:
    """Return the files by name; the same text for the same entries."""
    from markupsafe import Markup

    from xlstm_eval.report.pareto import pareto_figure  # matplotlib takes a second

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


def groups_of(entries: Sequence[Entry]) -> dict[str, str]:
    """Name the tasks that each entry answered: A, B, ...; equal letters were asked the same.

    Published rows are on the tasks of their own tables.
    """
    letters: dict[tuple[str, str], str] = {}
    found = {}
    for entry in entries:
        if not entry.asked:
            found[entry.name] = "own tables"
            continue
        # Without its teacher's items two students were not compared with the same scores.
        key = (entry.asked, entry.teacher)
        letters.setdefault(key, f"set {len(letters) + 1}")
        found[entry.name] = letters[key]
    return found


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points that no other beats in both coordinates, by the first one.

    Less is better in both. Of equal points the first counts.
    """
    front: list[int] = []
    lowest = float("inf")
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < lowest:
            front.append(index)
            lowest = points[index][1]
    return front


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
