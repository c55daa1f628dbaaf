"""Commands that run no stage: score and schema (plan and status have tests in their rooms)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from xlstm_distill.recipe.reference import json_schema

Call = Callable[..., Result]
ErrorOf = Callable[[Result, int], str]


def test_schema_is_that_of_the_recipe(call: Call) -> None:
    assert json.loads(call("schema").stdout) == json_schema()


def test_score_prints_a_table_or_json(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"tasks": [{"task": "a", "teacher": 0.8, "student": 0.76}]}))
    assert "critical tolerance (rate 0.5)   0.0500" in call("score", file).stdout
    assert json.loads(call("score", file, "--json").stdout)["critical_tolerance"] == 0.05


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "error: scores.json: not JSON at line 1"),
        (
            '{"tasks": [{"task": "a", "teacher": NaN, "student": 1}]}',
            "error: tasks[0].teacher: nan is not a finite number.",
        ),
        ('{"tasks": []}', "error: tasks: empty."),
    ],
)
def test_bad_score_file_gives_one_line(
    call: Call, tmp_path: Path, text: str, expected: str, error_of: ErrorOf
) -> None:
    (tmp_path / "scores.json").write_text(text)
    assert error_of(call("score", "scores.json"), 2).startswith(expected)
    assert error_of(call("score", "nope.json"), 2).startswith("error: nope.json: no such file.")
