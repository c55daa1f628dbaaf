"""The report of a run: one HTML file that needs nothing else, the same in Markdown, and the figures in JSON."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from xlstm_eval.metrics import ALPHAS, compare, pair_results
from xlstm_eval.records import Comparison, EvalError, Frozen, Name, TaskResult
from xlstm_eval.report.names import duration, short_names
from xlstm_eval.score import percent, with_stderr

Finite = Annotated[float, Field(allow_inf_nan=False)]
HEADLINE_ALPHA = 0.05


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
            raise ValueError(
                f"value: {len(self.value)} values for {len(self.step)} steps. Give one for each."
            )
        return self


class ReportData(Frozen):
    """Hold all that a report shows.

    ``gates`` maps a model's name to its mean output gates, layers x heads. ``losses`` maps a stage ("align",
    "distill/math") to its named curves. ``timings`` maps a stage to seconds. ``provenance`` holds versions, seeds,
    commit, hardware; ``recipe`` the recipe's text.
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [model.name for model in self.models]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"models: the name {min(twice)!r} appears twice. Give each model its own."
            )
        for name, rows in (self.gates or {}).items():
            if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
                raise ValueError(
                    f"gates.{name}: rows of unequal length, or none. Give layers x heads."
                )
        return self

    def headline(self) -> ReportModel:
        """Return the model the report is about: the merged one, else the first."""
        return next((model for model in self.models if model.role == "merged"), self.models[0])

    def comparisons(self) -> list[Comparison]:
        """Compare every model with the teacher, at the grid and at the headline's tolerance."""
        alphas = sorted({*self.alphas, 0.0, HEADLINE_ALPHA})
        return [
            compare(m.name, pair_results(self.teacher_results, m.results), alphas)
            for m in self.models
        ]


def write_report(data: ReportData, directory: str | Path) -> Path:
    """Write report.html, report.md and report.json into ``directory`` and return the path of the HTML file.

    All or nothing: the files are written into a folder beside it, which then takes its place.
    """
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh.chmod(0o755)
        for name, text in render(data).items():
            (fresh / name).write_text(text, encoding="utf-8")
        _replace(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target / "report.html"


def render(data: ReportData) -> dict[str, str]:
    """Return the report's files by name; the same text for the same data."""
    comparisons = data.comparisons()
    context = _context(data, comparisons)
    environment = _environment()
    return {
        "report.html": environment.get_template("report.html.j2").render(
            context, figures=_figures(data, comparisons)
        ),
        "report.md": environment.get_template("report.md.j2").render(context),
        "report.json": json.dumps(
            report_values(data, comparisons), indent=1, ensure_ascii=False, allow_nan=False
        ),
    }


def report_values(data: ReportData, comparisons: list[Comparison]) -> dict[str, Any]:
    """Return the content of report.json."""
    return {
        "title": data.title,
        "teacher": {
            "name": data.teacher,
            "scores": {result.task: result.score for result in data.teacher_results},
            "stderr": {result.task: result.stderr for result in data.teacher_results},
        },
        "models": [
            {
                "name": model.name,
                "role": model.role,
                "scores": {pair.task: pair.student for pair in result.tasks},
                "stderr": {pair.task: pair.student_stderr for pair in result.tasks},
                "recovery": result.recovery,
                "recovery_by_domain": result.recovery_by_domain,
                "mean_recovery": result.mean_recovery,
                "win_and_tie": result.win_and_tie,
                "critical_tolerance": result.critical_tolerance,
                "critical_tolerance_75": result.critical_tolerance_75,
                "worst_drop": result.worst_drop,
                "worst_task": result.worst_task,
                "lossless": result.lossless,
            }
            for model, result in zip(data.models, comparisons, strict=True)
        ],
        "tasks": {
            result.task: {
                "domain": result.domain,
                "metric": result.metric,
                "samples": result.samples,
                "higher_is_better": result.higher_is_better,
            }
            for result in data.teacher_results
        },
        "gates": data.gates,
        "timings": data.timings,
        "provenance": data.provenance,
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
    }


def _cells(result: Comparison) -> list[dict[str, Any]]:
    """Return the table's cells: score, recovery, and how strongly to shade (0 to 1; at 30 % off it is full)."""
    cells = []
    for pair in result.tasks:
        rate = result.recovery[pair.task]
        cells.append(
            {
                "score": pair.student,
                "stderr": pair.student_stderr,
                "recovery": rate,
                "side": "none" if rate is None else "above" if rate >= 1 else "below",
                "strength": 0.0 if rate is None else min(1.0, abs(rate - 1) / 0.3),
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
    """Return each stage's total and its parts: "distill/math" and "distill/code" are parts of "distill"."""
    stages: dict[str, tuple[float, dict[str, float]]] = {}
    for label, seconds in timings.items():
        stage, _, part = label.partition("/")
        total, parts = stages.get(stage, (0.0, {}))
        stages[stage] = (total + seconds, parts | ({part: seconds} if part else {}))
    return stages


def _figures(data: ReportData, comparisons: list[Comparison]) -> dict[str, Any]:
    """Draw every figure; markup made by charts.py from escaped text, so safe to place as it is."""
    from markupsafe import Markup

    from xlstm_eval.report import charts

    headline = data.headline().name
    losses = {
        stage: {
            name: (curve.step, curve.value, curve.unit)
            for name, curve in curves.items()
            if curve.step
        }
        for stage, curves in data.losses.items()
    }
    return {
        "win_and_tie": Markup(charts.win_and_tie_figure(comparisons, headline)),
        "recovery": Markup(charts.recovery_figure(comparisons, headline)),
        "gates": {
            name: Markup(charts.gate_figure(name, rows, f"gate{index}"))
            for index, (name, rows) in enumerate((data.gates or {}).items())
        },
        "losses": {
            stage: Markup(charts.loss_figure(stage, curves, f"loss{index}"))
            for index, (stage, curves) in enumerate(losses.items())
            if curves
        },
    }


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "duration": duration,
        "score": _score,
        "cell": _markdown_cell,
    }
    environment.globals["with_stderr"] = with_stderr
    return environment


def _score(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def _markdown_cell(value: object) -> str:
    """Keep a text inside its cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _replace(fresh: Path, target: Path) -> None:
    """Put ``fresh`` in the place of ``target``; the old report is removed only after the new one stands."""
    if not target.exists():
        fresh.rename(target)
        return
    if not target.is_dir():
        raise EvalError(f"report: {target} is a file. Give a folder.")
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.replace(target, old)
    fresh.rename(target)
    shutil.rmtree(old)
