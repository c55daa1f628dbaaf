"""Samples: the items of a task as lm-eval logs them, in the order of `TaskResult.items`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xlstm_eval.records import TaskResult

GROUPS_FILE = "groups.json"
"""In a folder of samples: the tasks of which each group consists, in the order of its items."""

LARGEST = 300
"""Digits of whole numbers that a float holds too."""

Row = dict[str, Any]
"""One item of a task as lm-eval logs it: doc, arguments, resps, filter, each metric's value."""
Rows = Callable[[TaskResult], Iterator[Row]]
"""Give a task's rows in the order of its items; none where they are not there."""


def folder_rows(folder: Path) -> Rows:
    """Return the rows that an evaluation left in its folder."""
    file = folder / GROUPS_FILE
    groups: dict[str, list[str]] = {}
    if file.is_file():
        groups = json.loads(file.read_text(encoding="utf-8"))

    def rows(task: TaskResult) -> Iterator[Row]:
        files = [folder / f"{name}.jsonl" for name in groups.get(task.task, [task.task])]
        # Without one of its members, the rows of a group would be counted wrongly.
        if all(file.is_file() for file in files):
            for file in files:
                yield from counted(read_lines(file), task)

    return rows


def counted(rows: Iterator[Row], task: TaskResult) -> Iterator[Row]:
    """Yield the rows that make a task's score: an item is logged once for each filter."""
    filter_name = task.metric.rpartition(",")[2]
    return (row for row in rows if row["filter"] == filter_name)


def whole_number(digits: str) -> int | float:
    """Read a whole number of JSON; one that is beyond every score is infinite."""
    return int(digits) if len(digits) <= LARGEST else math.copysign(math.inf, float(digits))


def read_lines(path: Path) -> Iterator[Row]:
    """Read JSON lines, one at a time."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line, parse_int=whole_number)


def as_logged(row: Row) -> Row:
    """Undo what lm-eval changes when it saves a row: arguments by name, numbers as texts.

    Parts of another shape, of scripts that write such files, become lists too.
    """
    arguments = row.get("arguments")
    if isinstance(arguments, Mapping):
        # {"gen_args_0": {"arg_0": prompt, "arg_1": continuation}}, in the order of the requests.
        arguments = list(arguments.values())
    return row | {
        "arguments": [_values(argument) for argument in _list(arguments)],
        "resps": _list(row.get("resps")),
        "filtered_resps": [_likelihood(answer) for answer in _list(row.get("filtered_resps"))],
    }


def _list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def _values(argument: Any) -> list[Any]:
    """Return an argument's prompt and what follows it; never empty."""
    found = list(argument.values()) if isinstance(argument, Mapping) else _list(argument)
    return found or [""]


def _likelihood(answer: Any) -> Any:
    """Read ["-1.5", "False"] as numbers, and leave any other answer as it is."""
    if not isinstance(answer, list) or len(answer) != 2 or answer[1] not in ("True", "False"):
        return answer
    try:
        return [float(answer[0]), answer[1] == "True"]
    except (TypeError, ValueError):
        return answer
