"""What an evaluation of one model gives: scores, items, and evidence of what it was asked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xlstm_eval.problems import did_you_mean, one_line
from xlstm_eval.records import EvalError, LongContext, TaskResult
from xlstm_eval.samples import GROUPS_FILE, Row
from xlstm_eval.suites import Suite, SuiteTask

ITEMS_FILE = "items.json"
LONG_CONTEXT_FILE = "long_context.json"
ANSWERS_FILE = "long_context_answers.jsonl"

# Taken in this order where a task reports several metrics and the suite names none.
PREFERRED_METRICS = (
    "exact_match",
    "acc",
    "pass@1",
    "pass_at_1",
    "math_verify",
    "prompt_level_strict_acc",
    "f1",
    "word_perplexity",
)


CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes")
"""Metrics of multiple-choice tasks that ask each choice once: guessing has a known score."""


@dataclass(frozen=True)
class EvaluationResult:
    """Hold one model's scores and the evidence of how they were made.

    ``requests_hash`` covers every request in order: task, item, prompt, generation settings. Two
    models with equal hashes were asked exactly the same. ``warnings`` are lm-eval's on truncated
    prompts. ``protocol`` is how they were answered (`harness._protocol`). ``groups`` maps tasks
    that are groups to their members, by which samples are kept.
    """

    tasks: tuple[TaskResult, ...]
    samples: dict[str, list[Row]] = field(repr=False)
    seconds: float
    requests_hash: str
    settings_hash: str
    warnings: tuple[str, ...] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)


def require_same_requests(hashes: Mapping[str, str], teacher: str = "teacher") -> None:
    """Raise EvalError unless all models were asked exactly what the teacher was asked.

    ``hashes`` maps each model's name, also the teacher's, to its ``requests_hash``.
    """
    expected = hashes[teacher]
    for name, found in hashes.items():
        if found != expected:
            raise EvalError(
                f"{name}: its requests differ from the teacher's ({found[:12]}, {expected[:12]}). "
                "Evaluate both again, with one suite and one tokenizer."
            )


def write_samples(result: EvaluationResult, directory: Path) -> list[Path]:
    """Write every item's prompt, answer and score as one JSONL file per task."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for task, rows in result.samples.items():
        path = directory / f"{task}.jsonl"
        # Rows may hold objects that JSON does not know; their text is enough to read.
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        paths.append(path)
    if result.groups:
        (directory / GROUPS_FILE).write_text(json.dumps(result.groups), encoding="utf-8")
    return paths


def write_items(result: EvaluationResult, path: Path) -> None:
    """Write the scores of all items as one JSON file: a list for each task that has them."""
    items = {task.task: task.items for task in result.tasks if task.items is not None}
    # Whole numbers take half the room: a suite may have 100,000 items.
    short = {
        task: [int(value) if value.is_integer() else value for value in values]
        for task, values in items.items()
    }
    path.write_text(json.dumps(short, separators=(",", ":")) + "\n", encoding="utf-8")


def read_items(directory: Path, tasks: Sequence[TaskResult]) -> tuple[TaskResult, ...]:
    """Return the results with the items that an evaluation left in its folder.

    An evaluation of before there was an ``items.json`` has them in its samples.
    """
    file = directory / ITEMS_FILE
    if file.is_file():
        items = json.loads(file.read_text(encoding="utf-8"))
    else:
        items = {task.task: _logged_items(directory / "samples", task) for task in tasks}
    # Validated anew, so that a damaged file is an error and not a wrong figure.
    return tuple(
        TaskResult.model_validate(task.model_dump() | {"items": items.get(task.task)})
        for task in tasks
    )


def read_long_context(directory: Path) -> LongContext | None:
    """Return the long-context results that an evaluation left in its folder; None without any."""
    file = directory / LONG_CONTEXT_FILE
    return LongContext.model_validate_json(file.read_bytes()) if file.is_file() else None


def _logged_items(folder: Path, task: TaskResult) -> list[float] | None:
    """Read a task's items from its samples; None if it is a group, or the score is no mean."""
    file = folder / f"{task.task}.jsonl"
    if not file.is_file():
        return None
    metric, _, filter_name = task.metric.rpartition(",")
    values = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["filter"] == filter_name:
                values.append(row.get(metric))
    if len(values) != task.samples or not all(map(_is_number, values)):
        return None
    mean = sum(values) / len(values)
    return [float(v) for v in values] if math.isclose(mean, task.score, abs_tol=1e-9) else None


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float))


def pick_metric(entry: SuiteTask, scores: dict[str, Any]) -> tuple[str, str]:
    """Choose which of a task's scores to report: (metric, filter).

    The metric is the suite's, else the only one, else the first of PREFERRED_METRICS. The filter is
    the suite's, else the metric's first. Raises EvalError: not there, or several and none named.
    """
    # lm-eval's keys are "metric,filter", beside "metric_stderr,filter" and some without a comma.
    filters: dict[str, list[str]] = {}
    for key in scores:
        name, comma, filter_name = key.partition(",")
        if comma and not name.endswith("_stderr"):
            filters.setdefault(name, []).append(filter_name)
    # A task's order of metrics is no order of importance, so several need a name or a preference.
    metric = entry.metric or _usual_metric(list(filters))
    if metric is None:
        raise EvalError(
            f"{entry.name}.metric: not named, and the task has {', '.join(filters)}. Name one."
        )
    if metric not in filters:
        hint = did_you_mean(metric, list(filters))
        raise EvalError(f"{entry.name}.metric: the task has no {metric!r}. {hint}")
    own = filters[metric]
    if entry.filter is not None and entry.filter not in own:
        hint = did_you_mean(entry.filter, own)
        raise EvalError(f"{entry.name}.filter: {metric} has no {entry.filter!r}. {hint}")
    return metric, entry.filter or own[0]


def _usual_metric(metrics: Sequence[str]) -> str | None:
    """Return the only metric, else the first that is preferred, else None."""
    if len(metrics) == 1:
        return metrics[0]
    for name in PREFERRED_METRICS:
        if name in metrics:
            return name
    return None


def task_result(
    entry: SuiteTask, scores: Row, rows: Sequence[Row], higher_is_better: dict[str, bool]
) -> TaskResult:
    """Build a task's result from lm-eval's ``scores`` ("metric,filter" to value) and its rows.

    The standard error is that of a mean of independent items; a score that is no mean of its rows
    has none. Raises EvalError: metric or filter not there, a score negative or not finite.
    """
    metric, filter_name = pick_metric(entry, scores)
    score = scores[f"{metric},{filter_name}"]
    if not isinstance(score, Real):
        raise EvalError(f"{entry.name}: its {metric} is {score!r}, which is no number.")
    rows = [row for row in rows if row["filter"] == filter_name]
    if not rows:
        raise EvalError(f"{entry.name}: no item was logged under the filter {filter_name!r}.")
    values = [row[metric] for row in rows if _is_number(row.get(metric))]
    # Corpus scores (a perplexity, a group's weighted mean) are not the mean of their items.
    is_mean = len(values) == len(rows) and math.isclose(
        sum(values) / len(values), score, abs_tol=1e-9
    )
    # Only then is the score a count over samples, and comparisons can be exact.
    is_binary = is_mean and all(value in (0, 1) for value in values)
    try:
        return TaskResult(
            task=entry.name,
            metric=f"{metric},{filter_name}",
            score=float(score),
            metrics=all_metrics(scores),
            stderr=standard_error(values) if is_mean else None,
            domain=entry.domain,
            higher_is_better=bool(higher_is_better.get(metric, True)),
            samples=len(rows),
            correct=int(sum(values)) if is_binary else None,
            chance=chance_of(rows, metric) if entry.chance is None else entry.chance,
            items=tuple(map(float, values)) if is_mean else None,
        )
    except ValidationError as error:
        reason = one_line(error, TaskResult, whole="result")
        raise EvalError(f"{entry.name}: {reason}") from None


def chance_of(rows: Sequence[Row], metric: str) -> float | None:
    """Return the score of guessing on a multiple-choice task; None for other tasks.

    lm-eval asks for the log-likelihood of each choice, so an item has as many requests as choices.
    """
    asked = [row.get("arguments") for row in rows]
    # Files of others may hold anything there.
    choices = [len(each) if isinstance(each, Sequence | Mapping) else 0 for each in asked]
    if metric not in CHOICE_METRICS or min(choices, default=0) < 2:
        return None
    return sum(1 / count for count in choices) / len(choices)


def all_metrics(scores: Row) -> dict[str, float]:
    """Return every finite score of a task by lm-eval's key ("metric,filter"), sorted.

    Standard errors and what is no score (the task's name, its number of items) are left out.
    """
    found = {}
    for key in sorted(scores):
        name, comma, _ = key.partition(",")
        value = scores[key]
        # lm-eval writes "N/A" where a task has no such score; numpy's numbers count too.
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if comma and not name.endswith("_stderr") and is_number and math.isfinite(value):
            found[key] = float(value)
    return found


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent samples; None for a single one."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def hash_requests(samples: dict[str, list[Row]]) -> str:
    """Hash every request in order: task, item, prompt, generation settings or continuation."""
    requests = []
    for task, rows in samples.items():
        for row in rows:
            # lm-eval logs an item once for each filter; the request was made once.
            if row["filter"] == rows[0]["filter"]:
                # Answers are left out: the hash says what was asked.
                requests.append([task, row["doc_id"], row["arguments"]])
    return hash_value(requests)


def hash_value(value: object) -> str:
    """Hash a value by its JSON."""
    # Requests may hold objects that JSON does not know; their text counts.
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def settings_hash(suite: Suite, seed: int) -> str:
    """Hash a suite as far as answers and scores depend on it."""
    # Where the task files lie does not change what is asked, nor does the level of chance.
    # Consent to run code is no setting of it either; the judge is in the protocol.
    left_out: Any = {
        "include": True,
        "confirm_run_unsafe_code": True,
        "judge": True,
        "tasks": {"__all__": {"chance"}},
    }
    return hash_value([suite.model_dump(mode="json", exclude=left_out), seed])
