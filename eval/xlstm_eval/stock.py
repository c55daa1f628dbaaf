"""Read results that the stock lm-eval wrote (``--output_path`` with ``--log_samples``)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xlstm_eval.problems import kind_of, one_line
from xlstm_eval.protocol import require_same_protocol, task_protocols
from xlstm_eval.records import EvalError, Kind, TaskResult
from xlstm_eval.results import all_metrics, pick_metric, task_result
from xlstm_eval.samples import Row, Rows, as_logged, counted, read_lines, whole_number
from xlstm_eval.suites import SuiteTask

SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
PARTS: dict[str, Any] = {
    "results": dict,
    "configs": dict,
    "group_subtasks": list,
    "n-samples": dict,
    "higher_is_better": dict | None,
    "versions": object,
    "n-shot": object,
    "config": object,
}
"""What is read of a results file: objects, and what they hold."""
ASKED = {"doc_hash": "document", "prompt_hash": "prompt", "target_hash": "target"}
"""lm-eval's hashes of what an item is, and what they stand for."""


@dataclass(frozen=True)
class StockResults:
    """Hold one model's results and what shows that it was asked the same as others.

    ``asked`` maps each task with samples to its items in order: number, filter, hashes. ``rows``
    reads them again.
    """

    name: str
    tasks: tuple[TaskResult, ...]
    protocol: dict[str, Any]
    asked: dict[str, list[tuple[Any, ...]]] = field(repr=False)
    rows: Rows = field(repr=False)


def read_stock_results(path: Path) -> StockResults:
    """Read a results file with the samples in it, or in the files that lm-eval writes beside it.

    Of a task's metrics counts the only one, else the first that is preferred
    (`results.pick_metric`). A group is one task. Without samples, tasks have scores and no items.
    Raises EvalError: not such a file, several files of samples, no metric that stands out.
    """
    data = _read_json(path)
    missing = {"results", "configs"} - set(data)
    _refuse_old(data, path)
    if missing:
        raise EvalError(
            f"{path}: has no {' and no '.join(sorted(missing))}. "
            "Give a results file of lm-eval (--output_path DIR --log_samples)."
        )
    data = _checked(data, path)
    tasks, asked = [], {}
    groups = _tasks(data)
    if not groups or not any(map(_has_scores, data["results"].values())):
        raise EvalError(f"{path}: no task has a score. Give a results file of lm-eval.")
    for name, leaves in groups.items():
        rows = _rows_of(data, path, leaves)
        if rows is None:
            tasks.append(_scored_alone(name, leaves, data))
            continue
        higher = _higher_is_better(data, name)
        found = task_result(SuiteTask(name=name), data["results"][name], rows, higher)
        tasks.append(found.model_copy(update={"kind": _kind(leaves, data)}))
        asked[name] = [
            (row["doc_id"], row["filter"], *(row.get(key) for key in ASKED)) for row in rows
        ]

    def rows_again(task: TaskResult) -> Iterator[Row]:
        own = _rows_of(data, path, groups[task.task]) if task.task in asked else None
        return counted((as_logged(row) for row in own or ()), task)

    return StockResults(_model_name(data, path), tuple(tasks), _protocol(data), asked, rows_again)


def _refuse_old(data: Mapping[str, Any], path: Path) -> None:
    """Raise EvalError for scores by their metric alone: lm-eval 0.4 put filters beside it."""
    results = data.get("results")
    for name, scores in results.items() if isinstance(results, dict) else ():
        if isinstance(scores, dict) and scores and not _has_scores(scores):
            plain = [key for key, value in scores.items() if isinstance(value, float)]
            if plain:
                raise EvalError(
                    f"{path}: {name} has {plain[0]!r} without a filter, as lm-eval wrote it before "
                    "version 0.4. Evaluate with lm-eval 0.4.3 or later."
                )


def _checked(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a file's content with all parts that are read; raises EvalError: another shape."""
    found = dict(data)
    for key, kind in PARTS.items():
        part = data.get(key)
        found[key] = part = {} if part is None else part
        if not isinstance(part, dict):
            raise EvalError(f"{path}: {key} is no object. Give a results file of lm-eval.")
        for name, value in part.items():
            if not isinstance(value, kind):
                raise EvalError(
                    f"{path}: {key}.{name!r} is {kind_of(value)}. Give a results file of lm-eval."
                )
    for name, members in found["group_subtasks"].items():
        if not all(isinstance(member, str) for member in members):
            raise EvalError(
                f"{path}: group_subtasks.{name!r} must be a list of names. "
                "Give a results file of lm-eval."
            )
    for name in found["results"]:
        if not name.isprintable() or not name:
            raise EvalError(f"{path}: results: {name!r} is no task's name. Correct it there.")
    return found


def _rows_of(data: Mapping[str, Any], path: Path, leaves: Sequence[str]) -> list[Row] | None:
    """Return the samples of a task or group, each member's by number; None if some are missing."""
    rows: list[Row] = []
    for leaf in leaves:
        own = _samples(data, path, leaf)
        if own is None:
            return None
        _check_rows(own, path, leaf)
        rows += sorted(own, key=lambda row: int(row["doc_id"]))
    return rows or None


def _check_rows(rows: Sequence[Row], path: Path, task: str) -> None:
    """Raise EvalError for rows without number or filter, or an item that is there twice."""
    seen = set()
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("doc_id"), int):
            raise EvalError(f"{path}: samples of {task}: a row has no doc_id. Run lm-eval again.")
        if not isinstance(row.get("filter"), str):
            raise EvalError(
                f"{path}: samples of {task}: item {row['doc_id']} has no filter. "
                "Evaluate with lm-eval 0.4.3 or later."
            )
        key = (row["doc_id"], row["filter"])
        if key in seen:
            raise EvalError(
                f"{path}: samples of {task}: item {row['doc_id']} is there twice. Evaluate again "
                "into an empty folder: lm-eval appends to files."
            )
        seen.add(key)


def _scored_alone(name: str, leaves: Sequence[str], data: Mapping[str, Any]) -> TaskResult:
    """Return a task's result from its score, without items."""
    scores = data["results"][name]
    metric, filter_name = pick_metric(SuiteTask(name=name), scores)
    counts = data.get("n-samples") or {}
    error = scores.get(f"{metric}_stderr,{filter_name}")
    known = isinstance(error, int | float) and math.isfinite(error)
    items = sum(_count(counts, leaf) for leaf in leaves)
    if not items:
        raise EvalError(
            f"{name}: neither samples nor n-samples say how many items it has. "
            "Evaluate with lm-eval 0.4.3 or later, and --log_samples."
        )
    values = {
        "task": name,
        "metric": f"{metric},{filter_name}",
        "score": scores[f"{metric},{filter_name}"],
        "metrics": all_metrics(scores),
        "stderr": error if known else None,
        "higher_is_better": _higher_is_better(data, name).get(metric, True),
        "kind": _kind(leaves, data),
        "samples": items,
    }
    try:
        return TaskResult.model_validate(values)
    except ValidationError as problem:
        raise EvalError(f"{name}: {one_line(problem, TaskResult, whole='result')}") from None


def _count(counts: Mapping[str, Any], task: str) -> int:
    found = (counts.get(task) or {}).get("effective")
    if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
        raise EvalError(
            f"n-samples.{task!r}.effective is {kind_of(found)}, and must be a whole number. "
            "Give a results file of lm-eval."
        )
    return found or 0


def _kind(leaves: Sequence[str], data: Mapping[str, Any]) -> Kind:
    types = [(data["configs"].get(leaf) or {}).get("output_type") for leaf in leaves]
    return "generation" if all(own == "generate_until" for own in types) else "loglikelihood"


def _higher_is_better(data: Mapping[str, Any], task: str) -> dict[str, bool]:
    found = data.get("higher_is_better", {}).get(task) or {}
    return {metric: bool(value) for metric, value in found.items() if value is not None}


def require_same_items(teacher: StockResults, student: StockResults) -> None:
    """Raise EvalError unless both models were asked the same items under one protocol."""
    require_same_protocol(
        {"teacher": teacher.protocol, student.name: student.protocol}, teacher="teacher"
    )
    for task, asked in teacher.asked.items():
        # Tasks of one side alone are named by `metrics.pair_results`.
        others = student.asked.get(task, asked)
        if len(asked) != len(others):
            raise EvalError(
                f"{task}: {student.name} has {len(others)} samples, the teacher {len(asked)}. "
                "Evaluate both on the same items."
            )
        for ours, theirs in zip(others, asked, strict=True):
            if ours != theirs:
                raise EvalError(
                    f"{task}: item {theirs[0]} of {student.name} has another {_part(ours, theirs)} "
                    "than the teacher's. Evaluate both with one suite and one chat template."
                )


def _part(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    names = ("number", "filter", *ASKED.values())
    return next(name for name, a, b in zip(names, ours, theirs, strict=True) if a != b)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), parse_int=whole_number)
    except FileNotFoundError:
        raise EvalError(f"{path}: no such file. Give a results file of lm-eval.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise EvalError(f"{path}: cannot be read ({reason}).") from None
    except (ValueError, RecursionError) as error:  # also numbers of more than 4,300 digits
        raise EvalError(f"{path}: not JSON ({error}).") from None
    if not isinstance(data, dict):
        raise EvalError(f"{path}: holds no object. Give a results file of lm-eval.")
    return data


def _tasks(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the tasks that were asked for, each with lm-eval's tasks of which it consists."""
    below: dict[str, list[str]] = {
        name: list(members) for name, members in data.get("group_subtasks", {}).items() if members
    }
    members = {name for names in below.values() for name in names}
    # A group without a score of its own (a tag) stands for its members.
    scored = {name for name in below if _has_scores(data["results"].get(name))}
    found = {}
    for name, scores in data["results"].items():
        inside = any(name in below[group] for group in scored)
        if not isinstance(scores, dict) or (name in below and name not in scored):
            continue
        if not inside and (_has_scores(scores) or name not in members):
            found[name] = list(_leaves(name, below))
    return found


def _has_scores(scores: Any) -> bool:
    return isinstance(scores, dict) and any("," in key for key in scores)


def _leaves(
    name: str, below: Mapping[str, list[str]], above: tuple[str, ...] = ()
) -> Iterator[str]:
    if name in above:
        raise EvalError(f"group_subtasks: {name} is a member of itself. Run lm-eval again.")
    if name not in below:
        yield name
        return
    for member in below[name]:
        yield from _leaves(member, below, (*above, name))


def _samples(data: Mapping[str, Any], path: Path, task: str) -> list[Row] | None:
    """Return one task's samples: from the results file, else from the file of its date."""
    inside = data.get("samples") or {}
    if isinstance(inside, dict) and isinstance(inside.get(task), list):
        return list(inside[task])
    date = re.fullmatch(r"results_(.+)", path.stem)
    own = path.with_name(f"samples_{task}_{date[1]}.jsonl") if date else None
    if own is None or not own.is_file():
        # Renamed results: the samples are clear if there is only one such file.
        pattern = re.compile(rf"samples_{re.escape(task)}_\d{{4}}-.*\.jsonl")
        files = [file for file in sorted(path.parent.iterdir()) if pattern.fullmatch(file.name)]
        if not files:
            return None
        if len(files) > 1:
            raise EvalError(
                f"{path}: has {len(files)} samples files of {task} beside it; one is needed. "
                "Keep each run's files in a folder of their own."
            )
        own = files[0]
    try:
        return list(read_lines(own))
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise EvalError(f"{own}: not JSON lines ({error}).") from None


def _model_name(data: Mapping[str, Any], path: Path) -> str:
    """Return the model's name without folders, else the file's."""
    name = str(data.get("model_name") or "").rstrip("/").rpartition("/")[2]
    # A terminal would obey control characters.
    return "".join(letter if letter.isprintable() else "?" for letter in name) or path.stem


def _protocol(data: Mapping[str, Any]) -> dict[str, Any]:
    config = data.get("config") or {}
    return {
        "lm_eval": data.get("lm_eval_version"),
        "seed": {name: config.get(name) for name in SEEDS},
        "dtype": str(config.get("model_dtype", "")).removeprefix("torch."),
        "batch": str(config.get("batch_size")),
        "limit": config.get("limit"),
        "gen_kwargs": config.get("gen_kwargs"),
        "context": data.get("max_length"),
        "chat_template": data.get("chat_template_sha"),
        "system_instruction": data.get("system_instruction_sha"),
        "tasks": task_protocols(data, bool(data.get("fewshot_as_multiturn"))),
    }
