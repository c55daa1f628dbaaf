"""A report of results that the stock lm-eval wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xlstm_eval.metrics import MARGIN
from xlstm_eval.protocol import flat
from xlstm_eval.records import EvalError
from xlstm_eval.report.page import ReportData, ReportModel
from xlstm_eval.stock import StockResults, read_stock_results, require_same_items


def stock_report(files: Sequence[Path], margin: float = MARGIN) -> ReportData:
    """Return the report of a teacher's results file and of one or more students'.

    Raises EvalError: fewer than two files, files that lm-eval did not write, models that were not
    asked the same under one protocol.
    """
    if len(files) < 2:
        raise EvalError("--results: give the teacher's results file, then a student's.")
    teacher, *students = _named_apart([read_stock_results(path) for path in files], files)
    for student in students:
        require_same_items(teacher, student)
    return ReportData(
        title=f"{students[0].name} against {teacher.name}",
        teacher=teacher.name,
        teacher_results=teacher.tasks,
        models=tuple(
            ReportModel(name=student.name, role="student", results=student.tasks)
            for student in students
        ),
        provenance=_provenance(teacher, files),
        margin=margin,
    )


def _named_apart(results: list[StockResults], files: Sequence[Path]) -> list[StockResults]:
    """Give models of one name the names of their files, or numbers where those are equal too."""
    names = [found.name for found in results]
    if len(set(names)) < len(names):
        names = [path.stem for path in files]
    if len(set(names)) < len(names):
        names = [f"{name} {number}" for number, name in enumerate(names)]
    return [
        StockResults(name, found.tasks, found.protocol, found.asked)
        for name, found in zip(names, results, strict=True)
    ]


def _provenance(teacher: StockResults, files: Sequence[Path]) -> dict[str, str]:
    settings = flat({key: value for key, value in teacher.protocol.items() if key != "tasks"})
    found = {f"evaluation: {key}": str(value) for key, value in settings.items()}
    for task, own in teacher.protocol["tasks"].items():
        found[f"task {task}"] = f"version {own['version']}, {own['shots']} shots"
    # Names without folders: a report is passed on.
    return {"results files": ", ".join(path.name for path in files), **found}
