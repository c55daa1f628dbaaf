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
        (
            {"tasks": [{"task": "a", "teacher_items": [1, 0], "student_items": [1]}]},
            "tasks[0].student_items: 1 items, but teacher_items has 2.",
        ),
        (
            {"tasks": [GOOD | {"teacher_items": [1, 0]}]},
            "tasks[0]: teacher_items and student_items: give both or none.",
        ),
        (
            {"tasks": [GOOD | {"teacher_items": [1, 0], "student_items": [1, 0]}]},
            "tasks[0].student: 0.4 is not the mean of student_items, 0.5.",
        ),
        (
            {"tasks": [{"task": "a", "teacher_items": [], "student_items": []}]},
            "tasks[0].teacher_items: empty. Give at least one.",
        ),
        (
            {"tasks": [{"task": "a", "teacher_items": [1, "0"], "student_items": [1, 0]}]},
            "tasks[0].teacher_items[1]: '0' is text; give a number.",
        ),
        (
            {"tasks": [GOOD | {"teacher_items": [1, math.nan], "student_items": [1, 0]}]},
            "tasks[0].teacher_items[1]: nan is not a finite number.",
        ),
        (
            {"tasks": [GOOD | {"teacher_items": [True, 0], "student_items": [1, 0]}]},
            "tasks[0].teacher_items[0]: True is true/false; give a number.",
        ),
        (
            {"tasks": [GOOD | {"chance": 1}]},
            "tasks[0].chance: 1 must be less than 1.",
        ),
        (
            {
                "tasks": [
                    {"task": "a", "samples": 3, "teacher_items": [1, 0], "student_items": [1, 0]}
                ]
            },
            "tasks[0].samples: 3, but there are 2 items.",
        ),
        (
            {"tasks": [{"task": "a", "teacher_items": [-1, 0], "student_items": [1, 0]}]},
            "tasks[0].teacher: -0.5 must be at least 0.",
        ),
    ],
)
def test_bad_files_get_one_line(data: object, message: str) -> None:
    with pytest.raises(EvalError) as caught:
        load_pairs(data)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_items_give_scores_and_counts() -> None:
    items = {"teacher_items": [1, 1, 0], "student_items": [1, 0, 0]}
    (pair,) = load_pairs({"tasks": [{"task": "a", **items}]})
    assert (pair.teacher, pair.student, pair.samples) == (2 / 3, 1 / 3, 3)
    assert (pair.teacher_correct, pair.student_correct) == (2, 1)
    # A score that is the mean, rounded, is the mean.
    (pair,) = load_pairs({"tasks": [{"task": "a", "teacher": 0.667, "student": 0.33, **items}]})
    assert (pair.teacher, pair.student) == (2 / 3, 1 / 3)
    real = {"teacher_items": [7.5, 8], "student_items": [6, 8]}
    (pair,) = load_pairs({"tasks": [{"task": "a", **real}]})
    assert (pair.teacher, pair.student, pair.samples) == (7.75, 7.0, None)


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
        "heavy = {'torch', 'transformers', 'lm_eval', 'matplotlib', 'datasets', 'scipy'}\n"
        "heavy |= {'xlstm_distill', 'xlstm_kernels'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
