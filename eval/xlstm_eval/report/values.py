"""The file report.json: its records, and their JSON schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from xlstm_eval.records import Comparison, Frozen, Interval, LongContext, TaskResult
from xlstm_eval.report.data import ReportData, ReportModel
from xlstm_eval.report.items import Outcome
from xlstm_eval.report.merging import Merging, merging_sentence
from xlstm_eval.report.sentence import sentence
from xlstm_eval.report.speed import Speed
from xlstm_eval.score import statistics_values

FORMAT: Final = 2
"""Version of the file: it grows where a key is removed or means something else."""

ByTask = dict[str, float]


class TeacherValues(Frozen):
    """Hold the teacher's name and its scores by task; ``metrics`` are all that lm-eval reports."""

    name: str
    scores: ByTask
    stderr: dict[str, float | None]
    metrics: dict[str, ByTask]


class PooledValues(Frozen):
    """Hold what the decision over all tasks rests on (`xlstm_eval.records.Pooled`)."""

    margin: float
    tasks: int
    items: int
    kept: float | None
    kept_interval: Interval | None
    smallest_margin: float | None
    p_value: float | None
    reason: str


class Intervals(Frozen):
    """Hold 95 % intervals; null where there are no items to compute them from."""

    critical_tolerance: Interval | None
    critical_tolerance_75: Interval | None
    worst_drop: Interval | None
    mean_recovery: Interval | None
    win_and_tie: dict[str, Interval] | None
    recovery: dict[str, Interval | None]
    difference: dict[str, Interval | None]
    teacher: dict[str, Interval | None]
    student: dict[str, Interval | None]


class ModelValues(Frozen):
    """Hold one student against its teacher (docs/metric.md)."""

    name: str
    role: str
    scores: ByTask
    stderr: dict[str, float | None]
    metrics: dict[str, ByTask]
    recovery: dict[str, float | None]
    recovery_by_domain: dict[str, float | None]
    mean_recovery: float | None
    win_and_tie: ByTask
    critical_tolerance: float
    critical_tolerance_75: float
    worst_drop: float
    worst_task: str | None
    lossless: bool
    sentence: str
    apart: dict[str, str]
    decision: Literal["non-inferior", "inferior", "undecided"]
    pooled: PooledValues
    p_values: ByTask
    p_values_holm: ByTask
    differences: ByTask
    intervals: Intervals


class TaskValues(Frozen):
    """Hold what a task is, whoever answers it."""

    domain: str | None
    metric: str
    samples: int
    higher_is_better: bool


class MergingTask(Frozen):
    """Hold the merged student's and its domain's expert's score on one task, and their gap."""

    expert: str
    expert_score: float
    merged_score: float
    difference: float | None
    interval: Interval | None
    p_value_holm: float | None


class MergingValues(Frozen):
    """Hold what merging gains and loses against each domain's expert."""

    sentence: str
    tasks: dict[str, MergingTask]


class ReportValues(Frozen):
    """Hold the content of report.json."""

    format: Literal[2] = FORMAT
    title: str
    finished: str
    teacher: TeacherValues
    models: tuple[ModelValues, ...]
    tasks: dict[str, TaskValues]
    items: dict[Outcome, int] | None
    merging: MergingValues | None
    speed: dict[str, Speed]
    long_context: dict[str, LongContext]
    gates: dict[str, tuple[tuple[float | None, ...], ...]] | None
    timings: ByTask
    provenance: dict[str, str]


def report_values(
    data: ReportData, comparisons: Sequence[Comparison], merging: Merging | None
) -> ReportValues:
    """Return the content of report.json."""
    models = zip(data.models, comparisons, strict=True)
    results = data.teacher_results
    return ReportValues(
        title=data.title,
        finished=data.finished,
        teacher=TeacherValues(
            name=data.teacher,
            scores={result.task: result.score for result in results},
            stderr={result.task: result.stderr for result in results},
            metrics={result.task: result.metrics for result in results},
        ),
        models=tuple(_model_values(model, result) for model, result in models),
        tasks={result.task: _task_values(result) for result in results},
        items=data.items.counts if data.items else None,
        merging=_merging_values(merging) if merging else None,
        speed=data.speed,
        long_context=data.long_context,
        gates=data.gates,
        timings=data.timings,
        provenance=data.provenance,
    )


def _model_values(model: ReportModel, result: Comparison) -> ModelValues:
    known: dict[str, Any] = statistics_values(result)
    shared = set(ModelValues.model_fields) & set(Comparison.model_fields)
    return ModelValues(
        role=model.role,
        scores={pair.task: pair.student for pair in result.tasks},
        stderr={pair.task: pair.student_stderr for pair in result.tasks},
        metrics={own.task: own.metrics for own in model.results},
        sentence=sentence(result),
        **{field: getattr(result, field) for field in shared},
        **known,
    )


def _task_values(result: TaskResult) -> TaskValues:
    return TaskValues(
        domain=result.domain,
        metric=result.metric,
        samples=result.samples,
        higher_is_better=result.higher_is_better,
    )


def _merging_values(found: Merging) -> MergingValues:
    tasks = {}
    for pair, expert, own in found.rows():
        tasks[pair.task] = MergingTask(
            expert=expert,
            expert_score=pair.teacher,
            merged_score=pair.student,
            difference=own.difference if own else None,
            interval=own.difference_interval if own else None,
            p_value_holm=own.p_value_holm if own else None,
        )
    return MergingValues(sentence=merging_sentence(found), tasks=tasks)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of report.json."""
    schema = ReportValues.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_schema(path: str | Path) -> None:
    """Write the schema to a file; `make docs` does."""
    text = json.dumps(json_schema(), indent=1, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")
