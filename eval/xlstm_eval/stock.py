"""Read results that the stock lm-eval wrote (``--output_path`` with ``--log_samples``)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlstm_eval.protocol import require_same_protocol, task_protocols
from xlstm_eval.records import EvalError, TaskResult
from xlstm_eval.results import Row, task_result
from xlstm_eval.suites import SuiteTask

SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
ASKED = {"doc_hash": "document", "prompt_hash": "prompt", "target_hash": "target"}
"""lm-eval's hashes of what an item is, and what they stand for."""


@dataclass(frozen=True)
class StockResults:
    """Hold one model's results and what shows that it was asked the same as others.

    ``asked`` maps each task to its items in order: number, filter, hashes.
    """

    name: str
    tasks: tuple[TaskResult, ...]
    protocol: dict[str, Any]
    asked: dict[str, list[tuple[Any, ...]]]


def read_stock_results(path: Path) -> StockResults:
    """Read a results file with the samples in it, or in the files that lm-eval writes beside it.

    Of a task's metrics counts the only one, else the first that is preferred
    (`results.pick_metric`). A group is one task. Raises EvalError: not such a file, no samples, no
    metric that stands out.
    """
    data = _read_json(path)
    missing = {"results", "configs"} - set(data)
    if missing:
        raise EvalError(
            f"{path}: has no {' and no '.join(sorted(missing))}. "
            "Give a results file of lm-eval (--output_path DIR --log_samples)."
        )
    tasks, asked = [], {}
    for name, leaves in _tasks(data).items():
        rows: list[Row] = []
        for leaf in leaves:
            rows += sorted(_samples(data, path, leaf), key=lambda row: int(row["doc_id"]))
        higher = data.get("higher_is_better", {}).get(name) or {}
        own = {metric: is_better for metric, is_better in higher.items() if is_better is not None}
        tasks.append(task_result(SuiteTask(name=name), data["results"][name], rows, own))
        asked[name] = [
            (row["doc_id"], row["filter"], *(row.get(key) for key in ASKED)) for row in rows
        ]
    return StockResults(_model_name(data, path), tuple(tasks), _protocol(data), asked)


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
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvalError(f"{path}: no such file. Give a results file of lm-eval.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise EvalError(f"{path}: cannot be read ({reason}).") from None
    except (json.JSONDecodeError, RecursionError) as error:
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
        if name in below and name not in scored:
            continue
        if not inside and (_has_scores(scores) or name not in members):
            found[name] = list(_leaves(name, below))
    return found


def _has_scores(scores: Any) -> bool:
    return isinstance(scores, dict) and any("," in key for key in scores)


def _leaves(name: str, below: Mapping[str, list[str]]) -> Iterator[str]:
    if name not in below:
        yield name
        return
    for member in below[name]:
        yield from _leaves(member, below)


def _samples(data: Mapping[str, Any], path: Path, task: str) -> list[Row]:
    """Return one task's samples: from the results file, else from the file of its date."""
    inside = data.get("samples") or {}
    if task in inside:
        return list(inside[task])
    date = re.fullmatch(r"results_(.+)", path.stem)
    own = path.with_name(f"samples_{task}_{date[1]}.jsonl") if date else None
    if own is None or not own.is_file():
        # Renamed results: the samples are clear if there is only one such file.
        pattern = re.compile(rf"samples_{re.escape(task)}_\d{{4}}-.*\.jsonl")
        files = [file for file in sorted(path.parent.iterdir()) if pattern.fullmatch(file.name)]
        if len(files) != 1:
            raise EvalError(
                f"{path}: has {len(files) or 'no'} samples files of {task} beside it; one is "
                "needed. Run lm-eval with --log_samples and keep its files together."
            )
        own = files[0]
    with own.open(encoding="utf-8") as lines:
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except json.JSONDecodeError as error:
            raise EvalError(f"{own}: not JSON lines ({error}).") from None


def _model_name(data: Mapping[str, Any], path: Path) -> str:
    """Return the model's name without folders, else the file's."""
    name = data.get("model_name") or ""
    return str(name).rstrip("/").rpartition("/")[2] or path.stem


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
