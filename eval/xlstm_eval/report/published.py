"""Rows of published tables: printed scores as data, scored like any others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xlstm_eval.metrics import ALPHAS, compare
from xlstm_eval.records import TaskPair
from xlstm_eval.report.entries import Entry
from xlstm_eval.statistics.measure import measure

TABLES = Path(__file__).parent / "tables" / "xlstm-distillation.json"


def read_tables() -> dict[str, Any]:
    """Return the paper's tables: scores by table, model and task, and a row for each student."""
    tables: dict[str, Any] = json.loads(TABLES.read_text(encoding="utf-8"))
    return tables


def published_entries() -> list[Entry]:
    """Return the paper's students and those it compares with, against their teachers.

    On the tasks for which the paper prints a critical tolerance. There are no items, and so no
    intervals.
    """
    tables = read_tables()
    entries = []
    for row in tables["students"]:
        pairs = []
        for table in row["tables"]:
            scores = tables[table][row["student"]]
            for task, teacher in tables[table][row["teacher"]].items():
                pairs.append(
                    TaskPair(task=task, teacher=teacher, student=scores[task], domain=table)
                )
        entries.append(
            Entry(
                name=row["student"],
                role="published",
                teacher=row["teacher"],
                comparison=measure(compare(row["student"], pairs, ALPHAS)),
                tokens=row["tokens"],
                source=tables["source"],
                printed_tolerance=row["reported"],
            )
        )
    return entries
