"""The paper's printed scores against its printed critical tolerances: what reproduces."""

from __future__ import annotations

from typing import Any

import pytest

from xlstm_eval.metrics import compare, critical_tolerance
from xlstm_eval.records import TaskPair
from xlstm_eval.report.published import published_entries, read_tables

TABLES = read_tables()
REPORTED = {row["student"]: row for row in TABLES["students"]}


def printed_pairs(row: dict[str, Any], shift: float = 0.0) -> list[TaskPair]:
    """Return a student's pairs; ``shift`` moves each score by so many units of its last digit."""
    pairs = []
    for table in row["tables"]:
        unit = 0.01 if table == "instruct" else 0.1
        for task, teacher in TABLES[table][row["teacher"]].items():
            student = TABLES[table][row["student"]][task]
            moved = (max(0.0, teacher - shift * unit), max(0.0, student + shift * unit))
            pairs.append(TaskPair(task=task, teacher=moved[0], student=moved[1]))
    return pairs


@pytest.mark.parametrize(
    ("student", "expected", "agrees"),
    [
        ("xLSTM-Llama3.1-8B", 0.0, True),
        ("xLSTM-Olmo3-7B", 0.0105, True),  # printed as 0.01
        ("xLSTM-Llama3.1-8B-IT", 0.0175, True),  # printed as 0.02
        ("xLSTM-Qwen2.5-7B-IT", 0.0370, False),  # 0.04, printed as 0.05
        ("LoLCATs", 0.9200, False),  # printed as 1.0
        ("QRWKV6-7B", 0.6859, False),  # printed as 1.0
    ],
)
def test_critical_tolerance_from_the_printed_scores(
    student: str, expected: float, agrees: bool
) -> None:
    found = critical_tolerance(printed_pairs(REPORTED[student]))
    assert found == pytest.approx(expected, abs=5e-5)
    assert (round(found, 2) == REPORTED[student]["reported"]) is agrees


@pytest.mark.parametrize(
    ("student", "within"), [("xLSTM-Qwen2.5-7B-IT", True), ("LoLCATs", False), ("QRWKV6-7B", False)]
)
def test_whether_rounding_of_the_scores_explains_the_difference(student: str, within: bool) -> None:
    row = REPORTED[student]
    low, high = (critical_tolerance(printed_pairs(row, shift)) for shift in (0.5, -0.5))
    assert low <= critical_tolerance(printed_pairs(row)) <= high
    assert (low - 0.005 <= row["reported"] <= high + 0.005) is within


def test_the_experts_merge_is_above_the_generalist() -> None:
    teacher = "Llama3.1-8B-IT"
    rows = [
        {"teacher": teacher, "tables": ["instruct"], "student": f"xLSTM-{teacher}{end}"}
        for end in ("", " generalist")
    ]
    merged, generalist = (compare(row["student"], printed_pairs(row)) for row in rows)
    assert all(merged.win_and_tie[alpha] >= rate for alpha, rate in generalist.win_and_tie.items())
    assert merged.critical_tolerance < generalist.critical_tolerance


def test_a_zero_score_of_the_student_counts_as_a_recovery_of_zero() -> None:
    found = compare("LoLCATs", printed_pairs(REPORTED["LoLCATs"]))
    assert (found.recovery["MBPP"], found.worst_drop) == (0.0, 1.0)
    assert not found.lossless


def test_published_rows_are_scored_from_the_printed_tables() -> None:
    entries = {entry.name: entry for entry in published_entries()}
    assert set(entries) == set(REPORTED)
    olmo = entries["xLSTM-Olmo3-7B"]
    assert olmo.comparison.critical_tolerance == pytest.approx(0.0105, abs=5e-5)
    assert (olmo.printed_tolerance, olmo.tokens, olmo.teacher) == (0.01, 20_000_000_000, "Olmo3-7B")
    assert "2603.15590" in olmo.source
    # Printed scores have no items: nothing can be decided.
    assert all(e.comparison.statistics.pooled.decision == "undecided" for e in entries.values())
