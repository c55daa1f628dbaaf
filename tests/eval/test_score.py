"""Scoring a file: JSON and text out, one clear line for a bad file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xlstm_eval.records import EvalError
from xlstm_eval.score import ScoreError, score_file

TASKS = [
    {
        "task": "add",
        "teacher": 0.9,
        "student": 0.9,
        "teacher_stderr": 0.03,
        "student_stderr": 0.02,
        "domain": "math",
    },
    {"task": "kv", "teacher": 0.8, "student": 0.76, "domain": "stem"},
    {"task": "ppl", "teacher": 10.0, "student": 12.5, "higher_is_better": False},
    {"task": "hard", "teacher": 0, "student": 0},
]


def written(folder: Path, text: str) -> Path:
    path = folder / "scores.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_json_has_the_keys_and_the_figures(tmp_path: Path) -> None:
    report = json.loads(score_file(written(tmp_path, json.dumps({"tasks": TASKS}))).to_json())
    assert report["recovery"] == {"add": 1.0, "kv": 0.95, "ppl": 0.8, "hard": None}
    assert report["win_and_tie"]["0.0"] == 0.5
    assert report["win_and_tie"]["0.05"] == 0.75
    assert report["win_and_tie"]["0.2"] == 1.0
    assert (report["critical_tolerance"], report["critical_tolerance_75"], report["lossless"]) == (
        0.0,
        0.05,
        True,
    )
    assert (report["worst_drop"], report["worst_task"], report["tasks"]) == (0.2, "ppl", 4)
    assert report["mean_recovery"] == pytest.approx((1 + 0.95 + 0.8) / 3)


def test_text_is_an_aligned_table(tmp_path: Path) -> None:
    lines = score_file(written(tmp_path, json.dumps({"tasks": TASKS}))).to_text().splitlines()
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[2].split() == [
        "add",
        "math",
        "0.900",
        "±",
        "0.030",
        "0.900",
        "±",
        "0.020",
        "100.0",
        "%",
    ]
    assert lines[5].split()[-1] == "-"
    assert "lossless (C at 0 >= 0.5)        yes" in lines
    assert any("lower is better" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tasks": [}', "not JSON at line 1, column 12"),
        ('{"tasks":\n[1,]}', "not JSON at line 2, column"),
        ("", "not JSON at line 1, column 1"),
        (
            '{"tasks": [{"task": "a", "teacher": NaN, "student": 1}]}',
            "tasks[0].teacher: nan is not a finite number",
        ),
        (
            '{"tasks": [{"task": "a", "teacher": 1, "student": -Infinity}]}',
            "tasks[0].student: -inf is not a finite",
        ),
        (
            '{"tasks": [{"task": "a", "teacher": 1, "student": 1e999}]}',
            "tasks[0].student: inf is not a finite number",
        ),
        (
            '{"tasks": [{"task": "a", "teacher": 1, "teacher": 2}]}',
            "teacher: the key appears twice in one object",
        ),
        ('{"tasks": [{"task": "a", "techer": 1, "student": 1}]}', "Did you mean 'teacher'?"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ScoreError) as caught:
        score_file(written(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="no such file"):
        score_file(tmp_path / "none.json")
    with pytest.raises(ScoreError, match="cannot be read"):
        score_file(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScoreError, match="not UTF-8"):
        score_file(tmp_path / "bytes.json")


@pytest.mark.parametrize(
    "values", ['"teacher": 1e-320, "student": 1e308', '"teacher": 1e-05, "student": 1e96']
)
def test_a_ratio_beyond_floats_is_refused(tmp_path: Path, values: str) -> None:
    with pytest.raises(EvalError) as caught:
        score_file(written(tmp_path, f'{{"tasks": [{{"task": "a", {values}}}]}}'))
    assert str(caught.value).startswith("a: the teacher's 1e-")
    assert "more than a factor 1e+100 apart" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ratio_below_floats_is_zero(tmp_path: Path) -> None:
    text = '{"tasks": [{"task": "a", "teacher": 1e308, "student": 1e-320}]}'
    assert score_file(written(tmp_path, text)).comparison.recovery == {"a": 0.0}


def test_an_integer_beyond_floats_is_refused(tmp_path: Path) -> None:
    text = '{"tasks": [{"task": "a", "teacher": 1, "student": 1' + "0" * 400 + "}]}"
    with pytest.raises(ScoreError, match=r"tasks\[0\]\.student"):
        score_file(written(tmp_path, text))
