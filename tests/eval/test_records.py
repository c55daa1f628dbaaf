"""Reading score files: what is refused, and in which words."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from xlstm_eval.records import EvalError, TaskPair, TaskResult, load_pairs

GOOD = {"task": "a", "teacher": 0.5, "student": 0.4}


def test_pairs_are_read_in_order_with_their_optional_fields() -> None:
    second = {"task": "b", "teacher": 1, "student": 0, "domain": "math", "higher_is_better": False}
    first, other = load_pairs({"tasks": [GOOD, second]})
    assert (first.task, first.teacher, first.student, first.higher_is_better) == (
        "a",
        0.5,
        0.4,
        True,
    )
    assert (other.domain, other.higher_is_better, other.teacher) == ("math", False, 1.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], 'the file holds a list; it must hold {"tasks": [...]}.'),
        ({"tasks": []}, "tasks: empty. Give at least one."),
        ({"tasks": {}}, "tasks: {} is a mapping; give a list."),
        ({"tasks": [3]}, "tasks[0]: 3 is a whole number; give a mapping."),
        ({"task": [GOOD]}, "task: unknown key. Did you mean 'tasks'?"),
        (
            {"tasks": [GOOD | {"studnet": 1.0}]},
            "tasks[0].studnet: unknown key. Did you mean 'student'?",
        ),
        ({"tasks": [{"task": "a", "teacher": 1.0}]}, "tasks[0].student: missing."),
        (
            {"tasks": [GOOD | {"teacher": math.nan}]},
            "tasks[0].teacher: nan is not a finite number.",
        ),
        (
            {"tasks": [GOOD | {"teacher": math.inf}]},
            "tasks[0].teacher: inf is not a finite number.",
        ),
        (
            {"tasks": [GOOD | {"student_stderr": math.nan}]},
            "tasks[0].student_stderr: nan is not a finite number.",
        ),
        (
            {"tasks": [GOOD | {"student": "0.4"}]},
            "tasks[0].student: '0.4' is text; give a number.",
        ),
        (
            {"tasks": [GOOD | {"student": True}]},
            "tasks[0].student: True is true/false; give a number.",
        ),
        (
            {"tasks": [GOOD | {"student": None}]},
            "tasks[0].student: None is nothing; give a number.",
        ),
        ({"tasks": [GOOD | {"student": -0.1}]}, "tasks[0].student: -0.1 must be at least 0."),
        (
            {"tasks": [GOOD | {"higher_is_better": 1}]},
            "tasks[0].higher_is_better: 1 is a whole number; give true or false.",
        ),
        ({"tasks": [GOOD | {"task": ""}]}, "tasks[0].task: empty."),
        ({"tasks": [GOOD, GOOD | {"task": "b"}, GOOD]}, "tasks[2].task: 'a' is already tasks[0]."),
        (
            {"tasks": [GOOD | {"samples": 10}]},
            "tasks[0]: samples, teacher_correct and student_correct: give all",
        ),
        (
            {"tasks": [GOOD | {"samples": 10, "teacher_correct": 5, "student_correct": 3}]},
            "tasks[0].student: 0.4 is not student_correct / samples = 3/10.",
        ),
    ],
)
def test_bad_files_get_one_line(data: object, message: str) -> None:
    with pytest.raises(EvalError) as caught:
        load_pairs(data)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_one_bad_value_is_one_problem() -> None:
    for values, count in (
        ({"student": "x"}, ""),
        ({"student": "x", "teacher": "y"}, " (and 1 more)"),
    ):
        with pytest.raises(EvalError) as caught:
            load_pairs({"tasks": [GOOD | values]})
        field = "teacher: 'y'" if count else "student: 'x'"
        assert str(caught.value) == f"tasks[0].{field} is text; give a number.{count}"


def test_a_count_cannot_exceed_the_samples() -> None:
    with pytest.raises(ValidationError, match="11 is more than samples"):
        TaskResult(task="a", metric="acc", score=1.0, samples=10, correct=11)


def test_records_are_immutable() -> None:
    pair = TaskPair(task="a", teacher=1.0, student=1.0)
    with pytest.raises(ValidationError):
        pair.student = 0.0  # type: ignore[misc]


def test_scoring_loads_no_heavy_library() -> None:
    code = (
        "import sys, xlstm_eval.score, xlstm_eval.records, xlstm_eval.metrics\n"
        "import xlstm_eval.problems, xlstm_eval.report.picture\n"
        "import xlstm_eval.suites, xlstm_eval.report\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'matplotlib', 'datasets'}\n"
        "heavy |= {'xlstm_distill', 'xlstm_kernels'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
