"""The suites that come with the package: one YAML table each, in the folder `tables`.

A recipe names one or several (`evaluate.suite: instruct`) and may change single tasks of them.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from xlstm_eval.problems import FieldError, did_you_mean
from xlstm_eval.records import EvalError
from xlstm_eval.suites.suite import Suite

TABLES = Path(__file__).parent / "tables"
EVERY_FILE = "every file"
"""What a table has for tasks where they are those of the folder `include`."""


@functools.cache
def suite_names() -> tuple[str, ...]:
    """Return the names of the suites, sorted."""
    return tuple(sorted(path.stem for path in TABLES.glob("*.yaml")))


def suite_settings(name: str, include: Path | None = None) -> dict[str, Any]:
    """Return a suite as plain values, with the keys of a recipe's section `evaluate`.

    ``include`` is the folder of task files, for a suite that takes all that are there.
    Raises EvalError: unknown name, or such a suite without a folder.
    """
    if name not in suite_names():
        raise EvalError(f"suite: {name!r} is unknown. {did_you_mean(name, suite_names())}")
    # A copy: what the caller changes must not change the next caller's suite.
    settings = copy.deepcopy(_read(name))
    if settings["tasks"] == EVERY_FILE:
        settings["tasks"] = _tasks_in(name, include)
    return settings


def joined_settings(
    names: Sequence[str], include: Path | None = None, leave_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Return several suites as one, in their order, without the tasks to leave out.

    ``leave_out`` holds names and patterns (``longbench_*``). Raises EvalError as `suite_settings`,
    and where two suites do not agree about a task or about the chat template; FieldError: nothing
    to leave out.
    """
    joined: dict[str, Any] = {"tasks": []}
    known: dict[str, tuple[str, Any]] = {}
    unused = dict(enumerate(leave_out))
    for name in names:
        settings = suite_settings(name, include)
        tasks = settings.pop("tasks")
        for key, value in settings.items():
            if joined.setdefault(key, value) != value:
                raise EvalError(
                    f"suite: {' and '.join(names)} do not agree about {key}. Name one of them."
                )
        for task in tasks:
            out = [
                index
                for index, rule in enumerate(leave_out)
                if fnmatch.fnmatchcase(task["name"], rule)
            ]
            for index in out:
                unused.pop(index, None)
            if not out and _is_new(task, name, known):
                joined["tasks"].append(task)
    for index, rule in unused.items():
        hint = did_you_mean(str(rule), list(known))
        raise FieldError(f"leave_out[{index}]", f"{rule!r} is not in the suite. {hint}")
    return joined


def _is_new(task: dict[str, Any], suite: str, known: dict[str, tuple[str, Any]]) -> bool:
    """Tell whether no earlier suite has a task; raises EvalError: it has another."""
    first, before = known.setdefault(task["name"], (suite, task))
    if before != task:
        raise EvalError(
            f"suite: {task['name']} has other settings in {first} than in {suite}. Put it into "
            "leave_out, and under tasks with the settings that you want."
        )
    return before is task


def named_suite(name: str, include: Path | None = None) -> Suite:
    """Return a suite by its name. Raises EvalError: see `suite_settings`."""
    settings = suite_settings(name, include)
    # Not lm-eval's: `long_context.measure` asks them.
    settings.pop("long_context", None)
    return Suite.model_validate({"name": name, "include": include, **settings})


def _tasks_in(name: str, folder: Path | None) -> list[dict[str, Any]]:
    """Return the tasks that a folder's files define: those that generate first, then by name."""
    if folder is None or not folder.is_dir():
        raise EvalError(f"suite: {name} is a folder of task files. Name the folder in `include`.")
    found = []
    for path in sorted(folder.glob("*.yaml")):
        task = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
        if isinstance(task, dict) and isinstance(task.get("task"), str):
            domain = (task.get("metadata") or {}).get("domain")
            rank = task.get("output_type") != "generate_until"
            found.append((rank, {"name": task["task"], "domain": domain}))
    if not found:
        raise EvalError(f"suite: {folder} holds no task files (*.yaml).")
    return [entry for _, entry in sorted(found, key=lambda each: each[0])]


class _TaskLoader(yaml.SafeLoader):
    """Reads lm-eval's task files without the Python functions that they name."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


@functools.cache
def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((TABLES / f"{name}.yaml").read_text(encoding="utf-8"))
    return values
