"""A report of results that the stock lm-eval wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xlstm_eval.metrics import MARGIN
from xlstm_eval.protocol import flat
from xlstm_eval.records import EvalError, TaskResult
from xlstm_eval.report.items import MOST_ITEMS, read_item_set
from xlstm_eval.report.page import ReportData, ReportModel
from xlstm_eval.stock import StockResults, read_stock_results, require_same_items


def stock_report(
    files: Sequence[Path], margin: float = MARGIN, most_items: int = MOST_ITEMS
) -> ReportData:
    """Return the report of a teacher's results file and of one or more students'.

    Raises EvalError: fewer than two files, files that lm-eval did not write, models that were not
    asked the same under one protocol.
    """
    if len(files) < 2:
        raise EvalError("--results: give the teacher's results file, then a student's.")
    teacher, *students = _named_apart([read_stock_results(path) for path in files], files)
    for student in students:
        require_same_items(teacher, student)
    pairs = _pairs(teacher, students[0])
    return ReportData(
        title=f"{students[0].name} against {teacher.name}",
        teacher=teacher.name,
        teacher_results=teacher.tasks,
        models=tuple(
            ReportModel(name=student.name, role="student", results=student.tasks)
            for student in students
        ),
        items=read_item_set(teacher.rows, students[0].rows, pairs, most_items),
        no_items=_missing_items([teacher, *students]),
        provenance=_provenance(teacher, files),
        margin=margin,
    )


def _pairs(teacher: StockResults, student: StockResults) -> list[tuple[TaskResult, TaskResult]]:
    """Return the results of the tasks that both have; others are refused with the comparison."""
    by_task = {result.task: result for result in student.tasks}
    return [(own, by_task[own.task]) for own in teacher.tasks if own.task in by_task]


def _missing_items(models: Sequence[StockResults]) -> str:
    """Say which results came without samples, or with others; empty where none did."""
    lacking, other = [], []
    for model in models:
        missing = [task.task for task in model.tasks if task.task not in model.asked]
        if missing:
            which = "" if len(missing) == len(model.tasks) else f" of {', '.join(missing)}"
            lacking.append(f"{model.name} has no samples{which}")
        # A score of the whole corpus, or samples of another evaluation.
        names = [t.task for t in model.tasks if t.items is None and t.task in model.asked]
        other += [f"{name} ({model.name})" for name in names]
    sentences = []
    if lacking:
        sentences.append(
            f"{'; '.join(lacking)}: items, tests and intervals are missing, and whether all were "
            "asked the same could not be checked. Run lm-eval with --log_samples."
        )
    if other:
        sentences.append(
            f"No tests and intervals where the score is not the mean of its samples: "
            f"{', '.join(other)}."
        )
    return " ".join(sentences)


def _named_apart(results: list[StockResults], files: Sequence[Path]) -> list[StockResults]:
    """Give models of one name the names of their files, or numbers where those are equal too."""
    names = [found.name for found in results]
    if len(set(names)) < len(names):
        names = [path.stem for path in files]
    if len(set(names)) < len(names):
        names = [f"{name} {number}" for number, name in enumerate(names)]
    return [replace(found, name=name) for name, found in zip(names, results, strict=True)]


def _provenance(teacher: StockResults, files: Sequence[Path]) -> dict[str, str]:
    settings = flat({key: value for key, value in teacher.protocol.items() if key != "tasks"})
    found = {f"evaluation: {key}": str(value) for key, value in settings.items()}
    for task, own in teacher.protocol["tasks"].items():
        found[f"task {task}"] = f"version {own['version']}, {own['shots']} shots"
    # Names without folders: a report is passed on.
    return {"results files": ", ".join(path.name for path in files), **found}
