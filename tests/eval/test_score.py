"""Scoring a file: JSON and text out, one clear line for a bad file."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from xlstm_eval.records import EvalError
from xlstm_eval.score import ScoreError, score_file, with_stderr

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
    # "hard", on which the teacher has nothing, does not count.
    assert report["apart"] == {"hard": "the teacher's score is 0"}
    assert report["win_and_tie"]["0.0"] == pytest.approx(1 / 3)
    assert report["win_and_tie"]["0.05"] == pytest.approx(2 / 3)
    assert report["win_and_tie"]["0.2"] == 1.0
    assert (report["critical_tolerance"], report["critical_tolerance_75"], report["lossless"]) == (
        0.05,
        0.2,
        False,
    )
    # Without items there is nothing to decide by.
    assert (report["decision"], report["p_values"]) == ("undecided", {})
    assert report["intervals"]["critical_tolerance"] is None
    assert "no items" in report["pooled"]["reason"]
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
    assert "lossless (C at 0 >= 0.5)        no" in lines
    assert "Apart: hard: the teacher's score is 0." in lines
    # The paper's metric never stands alone.
    assert any(line.startswith("decision    undecided") for line in lines)
    assert any(line.startswith("worst drop  20.0 % on ppl") for line in lines)
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
        ('{"tasks": [{"task": "a", "teacher": 1' + "0" * 5000 + "}]}", "a number cannot be read"),
        (
            '{"tasks": [{"task": "\\u001b[2J", "teacher": 1, "student": 1}]}',
            r"tasks[0].task: '\x1b[2J' holds a control character",
        ),
        (
            '{"tasks": [{"task": "a", "teacher_items": [1e200, 1], "student_items": [1, 1]}]}',
            "tasks[0].teacher_items[0]: 1e+200 must be at most 1e+100",
        ),
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


def outcomes(both: int, teacher_only: int, student_only: int, neither: int) -> dict[str, list[int]]:
    return {
        "teacher_items": [1] * (both + teacher_only) + [0] * (student_only + neither),
        "student_items": [1] * both + [0] * teacher_only + [1] * student_only + [0] * neither,
    }


ITEMS = [
    {"task": "stock", "domain": "chat", **outcomes(60, 20, 2, 18)},
    {"task": "add", "domain": "math", **outcomes(90, 2, 2, 6)},
    {"task": "copy", "domain": "stem", **outcomes(100, 0, 0, 0)},
    {"task": "judge", "teacher_items": [6.5, 7, 3, 9, 8], "student_items": [6, 7.5, 3, 9.5, 7]},
    {"task": "none", "teacher_items": [0] * 20, "student_items": [0, 1] * 10},
]


def test_items_give_tests_intervals_and_a_decision(tmp_path: Path) -> None:
    report = json.loads(score_file(written(tmp_path, json.dumps({"tasks": ITEMS}))).to_json())
    assert report["recovery"]["stock"] == pytest.approx(62 / 80)
    assert report["p_values"]["stock"] == pytest.approx(binomtest(2, 22).pvalue)
    assert (report["p_values"]["add"], report["p_values"]["copy"]) == (1.0, 1.0)
    assert report["p_values_holm"]["stock"] == pytest.approx(4 * report["p_values"]["stock"])
    assert report["apart"] == {"none": "the teacher's score is 0"}
    intervals = report["intervals"]
    for task in ("stock", "add", "copy", "judge"):
        low, high = intervals["recovery"][task]
        assert low < report["recovery"][task] < high or task == "copy"
        assert intervals["recovery"]["none"] is None
    for name in ("critical_tolerance", "critical_tolerance_75", "worst_drop", "mean_recovery"):
        low, high = intervals[name]
        assert low <= report[name] <= high
        assert low < high
    assert set(intervals["win_and_tie"]) == set(report["win_and_tie"])
    for alpha, (low, high) in intervals["win_and_tie"].items():
        assert low <= report["win_and_tie"][alpha] <= high
    assert report["decision"] == "inferior"
    pooled = report["pooled"]
    assert pooled["margin"] == 0.02
    assert pooled["kept_interval"][1] < 1
    assert pooled["smallest_margin"] == pytest.approx(1 - pooled["kept_interval"][0])


def drawn_tasks(seed: int) -> list[dict[str, object]]:
    """Tasks of few items on odd scales, as a script might hand them in."""
    rng = random.Random(seed)
    draw = {
        "binary": lambda: rng.randint(0, 1),
        "real": lambda: rng.random() * rng.choice([1, 100]),
        "constant": lambda: 0.5,
        "spread": lambda: abs(rng.gauss(0, 1)) * 10.0 ** rng.randint(-9, 9),
    }
    tasks: list[dict[str, object]] = []
    for index in range(rng.choice([1, 2, 3, 6])):
        one, count = draw[rng.choice(list(draw))], rng.choice([1, 2, 3, 30])
        sides = {f"{side}_items": [one() for _ in range(count)] for side in ("teacher", "student")}
        tasks.append({"task": f"t{index}", "higher_is_better": rng.random() < 0.7, **sides})
    return tasks


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", [2, 38, *range(100, 140)])
def test_odd_items_give_figures_and_no_traceback(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"tasks": drawn_tasks(seed)}))
    report = json.loads(score_file(path).to_json())
    for name in ("critical_tolerance", "critical_tolerance_75", "worst_drop"):
        found = report["intervals"][name]
        assert found is None or found[0] <= report[name] <= found[1]
    for task, rate in report["recovery"].items():
        found = report["intervals"]["recovery"].get(task)
        assert found is None or found[0] <= rate <= found[1]
    for task, value in report["p_values"].items():
        assert 0 < value <= report["p_values_holm"][task] <= 1


def test_the_margin_decides(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"tasks": ITEMS[:3]}))
    needed = score_file(path).comparison.statistics.pooled.smallest_margin
    assert score_file(path, margin=needed + 1e-9).comparison.statistics.pooled.decision == (
        "non-inferior"
    )
    with pytest.raises(EvalError, match=r"margin: 1.5 is not allowed"):
        score_file(path, margin=1.5)


def test_text_shows_differences_with_intervals(tmp_path: Path) -> None:
    text = score_file(written(tmp_path, json.dumps({"tasks": ITEMS}))).to_text()
    row = next(line for line in text.splitlines() if line.startswith("stock"))
    assert "-0.180" in row
    assert "[-0.2" in row
    assert "decision    inferior (margin 0.02)" in text
    assert "worst drop  22.5 % on stock [" in text


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"tasks": ITEMS}))
    assert score_file(path).to_json() == score_file(path).to_json()


def test_one_task_without_items_leaves_no_decision(tmp_path: Path) -> None:
    tasks = [*ITEMS[:2], {"task": "mmlu", "teacher": 0.6, "student": 0.6}]
    report = json.loads(score_file(written(tmp_path, json.dumps({"tasks": tasks}))).to_json())
    assert report["decision"] == "undecided"
    assert report["pooled"]["reason"] == "no items (or a single one) of mmlu"
    assert report["intervals"]["critical_tolerance"] is None
    assert set(report["p_values"]) == {"stock", "add"}


def test_where_no_task_counts_nothing_is_said_of_any(tmp_path: Path) -> None:
    tasks = [{"task": "a", "chance": 0.5, **outcomes(10, 10, 10, 10)}]
    text = score_file(written(tmp_path, json.dumps({"tasks": tasks}))).to_text()
    assert "Apart: a: the teacher is at chance (0.50)." in text
    assert "worst drop  -\n" in text
    assert text.endswith(
        "No task counts, so there is no Win-and-Tie rate and no critical tolerance."
    )


def test_the_mark_of_windows_editors_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeff" + json.dumps({"tasks": ITEMS}))
    assert score_file(path).comparison.tasks[0].task == "stock"


def test_sixty_tasks_of_ten_thousand_items_take_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tasks = []
    for number in range(60):
        drawn = rng.multinomial(10_000, (0.7, 0.05, 0.04, 0.21)).tolist()
        tasks.append({"task": f"t{number}", **outcomes(*drawn)})
    path = written(tmp_path, json.dumps({"tasks": tasks}))
    started = time.process_time()
    report = score_file(path)
    assert time.process_time() - started < 10
    low, high = report.comparison.statistics.mean_recovery
    assert high - low < 0.01


def test_a_score_of_equal_items_shows_no_standard_error():
    """± 0.000 beside a score of 1.000 would say that it is certain."""
    shown = [with_stderr(score, stderr) for score, stderr in ((1.0, 0.0), (0.5, 0.1), (0.5, None))]
    assert shown == ["1.000", "0.500 ± 0.100", "0.500"]
