"""The report of a run: one HTML file that needs nothing else, the same in Markdown and in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from xlstm_eval.metrics import ALPHAS, MARGIN, compare, pair_results
from xlstm_eval.problems import FieldError
from xlstm_eval.records import Comparison, Frozen, Name, TaskResult
from xlstm_eval.report.environment import environment, write_files
from xlstm_eval.report.names import short_names
from xlstm_eval.report.sentence import sentence
from xlstm_eval.score import statistics_values

Finite = Annotated[float, Field(allow_inf_nan=False)]
HEADLINE_ALPHA = 0.05
FULL_SHADE = 0.3
"""How far a score must be from its teacher's to be shaded most strongly in the table."""


class ReportModel(Frozen):
    """Name one student, its role (merged, expert, generalist, ...) and its results."""

    name: Name
    role: Name
    results: tuple[TaskResult, ...]


class Curve(Frozen):
    """Hold one training curve: values over steps."""

    step: tuple[int, ...]
    value: tuple[Finite, ...]
    unit: str = ""

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if len(self.step) != len(self.value):
            raise FieldError(
                "value", f"{len(self.value)} values for {len(self.step)} steps. Give one for each."
            )
        return self


class ReportData(Frozen):
    """Hold all that a report shows.

    ``gates`` maps a model's name to its mean output gates, layers x heads. ``losses`` maps a stage
    ("align", "distill/math") to its named curves, ``timings`` to its seconds. ``provenance`` holds
    seed, versions, machine and hashes; ``recipe`` is the recipe's text. ``margin`` is that of the
    decision over all tasks (`xlstm_eval.statistics.pooled`).
    """

    title: Name
    teacher: Name
    teacher_results: Annotated[tuple[TaskResult, ...], Field(min_length=1)]
    models: Annotated[tuple[ReportModel, ...], Field(min_length=1)]
    gates: dict[str, tuple[tuple[Finite, ...], ...]] | None = None
    losses: dict[str, dict[str, Curve]] = Field(default_factory=dict)
    timings: dict[str, Finite] = Field(default_factory=dict)
    provenance: dict[str, str] = Field(default_factory=dict)
    recipe: str = ""
    alphas: tuple[float, ...] = ALPHAS
    margin: float = MARGIN

    @model_validator(mode="after")
    def _check(self) -> Self:
        names: set[str] = set()
        for model in self.models:
            if model.name in names:
                raise FieldError(
                    "models", f"the name {model.name!r} appears twice. Give each model its own."
                )
            names.add(model.name)
        for name, rows in (self.gates or {}).items():
            lengths = {len(row) for row in rows}
            if len(lengths) != 1 or 0 in lengths:
                raise FieldError(
                    f"gates.{name}", "rows of unequal length, or none. Give layers x heads."
                )
        return self

    def headline(self) -> ReportModel:
        """Return the model the report is about: the merged one, else the first."""
        for model in self.models:
            if model.role == "merged":
                return model
        return self.models[0]

    def comparisons(self) -> list[Comparison]:
        """Compare every model with the teacher, at ``alphas`` and at the headline's tolerances.

        Each comparison has its statistics.
        """
        from xlstm_eval.statistics.measure import measure  # scipy takes a second to load

        # The tables of models need these two, whatever the recipe lists.
        alphas = sorted({*self.alphas, 0.0, HEADLINE_ALPHA})
        comparisons = []
        for model in self.models:
            pairs = pair_results(self.teacher_results, model.results)
            compared = compare(model.name, pairs, alphas)
            comparisons.append(measure(compared, alphas, self.margin))
        return comparisons


def write_report(data: ReportData, directory: str | Path) -> Path:
    """Write report.html, report.md and report.json; return the path of the HTML file.

    All or nothing: a folder beside ``directory`` is filled, which then takes its place.
    """
    return write_files(render(data), Path(directory)) / "report.html"


def render(data: ReportData) -> dict[str, str]:
    """Return the report's files by name; the same text for the same data."""
    comparisons = data.comparisons()
    context = _context(data, comparisons)
    figures = _figures(data, comparisons)
    made = environment()
    page = made.get_template("report.html.j2").render(context, figures=figures)
    text = made.get_template("report.md.j2").render(context)
    values = report_values(data, comparisons)
    return {
        "report.html": page,
        "report.md": text,
        # Without NaN: JSON has none, and scripts read this file.
        "report.json": json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False),
    }


def report_values(data: ReportData, comparisons: list[Comparison]) -> dict[str, Any]:
    """Return the content of report.json."""
    models = zip(data.models, comparisons, strict=True)
    return {
        "title": data.title,
        "teacher": {
            "name": data.teacher,
            "scores": {result.task: result.score for result in data.teacher_results},
            "stderr": {result.task: result.stderr for result in data.teacher_results},
            "metrics": {result.task: result.metrics for result in data.teacher_results},
        },
        "models": [_model_values(model, result) for model, result in models],
        "tasks": {result.task: _task_values(result) for result in data.teacher_results},
        "gates": data.gates,
        "timings": data.timings,
        "provenance": data.provenance,
    }


def _model_values(model: ReportModel, result: Comparison) -> dict[str, Any]:
    return {
        "name": model.name,
        "role": model.role,
        "scores": {pair.task: pair.student for pair in result.tasks},
        "stderr": {pair.task: pair.student_stderr for pair in result.tasks},
        "metrics": {own.task: own.metrics for own in model.results},
        "recovery": result.recovery,
        "recovery_by_domain": result.recovery_by_domain,
        "mean_recovery": result.mean_recovery,
        "win_and_tie": result.win_and_tie,
        "critical_tolerance": result.critical_tolerance,
        "critical_tolerance_75": result.critical_tolerance_75,
        "worst_drop": result.worst_drop,
        "worst_task": result.worst_task,
        "lossless": result.lossless,
        "sentence": sentence(result),
        "apart": result.apart,
        **statistics_values(result),
    }


def _task_values(result: TaskResult) -> dict[str, Any]:
    return {
        "domain": result.domain,
        "metric": result.metric,
        "samples": result.samples,
        "higher_is_better": result.higher_is_better,
    }


def _context(data: ReportData, comparisons: list[Comparison]) -> dict[str, Any]:
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
        "domains": _domain_spans(data.teacher_results),
        "short": short_names({result.task: result.domain for result in data.teacher_results}),
        "cells": {result.name: _cells(result) for result in comparisons},
        "total_seconds": sum(data.timings.values()),
        "stages": stages,
        "longest": longest,
        "items": sum(result.samples for result in data.teacher_results),
        "sentence": sentence(by_name[headline]),
    }


def _cells(result: Comparison) -> list[dict[str, Any]]:
    """Return the table's cells: score, recovery, side of the teacher, strength of shading."""
    cells = []
    for pair in result.tasks:
        rate = result.recovery[pair.task]
        side, strength = "none", 0.0
        # Without a rate (the teacher's score is 0) a cell has no side and no shade.
        if rate is not None:
            side = "above" if rate >= 1 else "below"
            strength = min(1.0, abs(rate - 1) / FULL_SHADE)
        cells.append(
            {
                "score": pair.student,
                "stderr": pair.student_stderr,
                "recovery": rate,
                "side": side,
                "strength": strength,
            }
        )
    return cells


def _domain_spans(results: tuple[TaskResult, ...]) -> list[tuple[str, int]]:
    """Return runs of equal domains in table order, for the head of the score table."""
    spans: list[tuple[str, int]] = []
    for result in results:
        domain = result.domain or "-"
        if spans and spans[-1][0] == domain:
            spans[-1] = (domain, spans[-1][1] + 1)
        else:
            spans.append((domain, 1))
    return spans


def _stage_times(timings: dict[str, float]) -> dict[str, tuple[float, dict[str, float]]]:
    """Return each stage's total and its parts; "distill/math" is a part of "distill"."""
    stages: dict[str, tuple[float, dict[str, float]]] = {}
    for label, seconds in timings.items():
        stage, _, part = label.partition("/")
        total, parts = stages.get(stage, (0.0, {}))
        if part:
            parts[part] = seconds
        stages[stage] = (total + seconds, parts)
    return stages


def _figures(data: ReportData, comparisons: list[Comparison]) -> dict[str, Any]:
    """Draw every figure, as markup that the template places as it is."""
    # Markup is not escaped again. That is safe: charts.py escapes every name it writes.
    from markupsafe import Markup

    # matplotlib takes a second to import.
    from xlstm_eval.report import charts

    headline = data.headline().name
    gates = {}
    for index, (name, rows) in enumerate((data.gates or {}).items()):
        gates[name] = Markup(charts.gate_figure(name, rows, f"gate{index}"))
    losses = {}
    for index, (stage, curves) in enumerate(data.losses.items()):
        series = {
            name: (curve.step, curve.value, curve.unit)
            for name, curve in curves.items()
            if curve.step
        }
        if series:
            losses[stage] = Markup(charts.loss_figure(stage, series, f"loss{index}"))
    shown = next(result for result in comparisons if result.name == headline)
    short = short_names({result.task: result.domain for result in data.teacher_results})
    has_items = shown.statistics is not None and bool(shown.statistics.tasks)
    return {
        "differences": Markup(charts.difference_figure(shown, short)) if has_items else None,
        "win_and_tie": Markup(charts.win_and_tie_figure(comparisons, headline)),
        "recovery": Markup(charts.recovery_figure(comparisons, headline)),
        "gates": gates,
        "losses": losses,
    }
