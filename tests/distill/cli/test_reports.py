"""`report` of what lies outside a run: results files of the stock lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def results_file(path: Path, name: str, right: int, **changes: Any) -> Path:
    """Write a results file as lm-eval's, with its samples inside: one task of 40 items."""
    rows = [
        {
            "doc_id": index,
            "filter": "none",
            "exact_match": float(index < right),
            "arguments": [[f"question {index}", {}]],
            "doc_hash": f"d{index}",
            "prompt_hash": f"p{index}",
            "target_hash": f"t{index}",
        }
        for index in range(40)
    ]
    values = {
        "results": {"sums": {"alias": "sums", "exact_match,none": right / 40}},
        "configs": {"sums": {"generation_kwargs": {"until": ["\n"]}}},
        "versions": {"sums": 2.0},
        "n-shot": {"sums": 5},
        "higher_is_better": {"sums": {"exact_match": True}},
        "config": {"model_dtype": "torch.bfloat16", "batch_size": 8},
        "model_name": f"/models/{name}",
        "samples": {"sums": rows},
    }
    path.write_text(json.dumps(values | changes))
    return path


def test_results_of_lm_eval_give_a_report(call: Any, tmp_path: Path) -> None:
    teacher = results_file(tmp_path / "teacher.json", "big", 38)
    student = results_file(tmp_path / "student.json", "small", 20)
    done = call("report", "--results", teacher, student, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "small: Keeps 53 % of its teacher; loses 45 points on sums." in done.stdout
    assert done.stdout.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'report.html'}"
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert values["teacher"]["name"] == "big"
    assert values["models"][0]["decision"] == "inferior"
    assert values["models"][0]["pooled"]["margin"] == 0.02
    call("report", "--results", teacher, student, "--out", tmp_path / "out", "--margin", "0.7")
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert values["models"][0]["decision"] == "non-inferior"


def test_another_protocol_is_refused_in_one_line(call: Any, tmp_path: Path, error_of: Any) -> None:
    teacher = results_file(tmp_path / "teacher.json", "big", 38)
    student = results_file(tmp_path / "student.json", "small", 20, **{"n-shot": {"sums": 8}})
    done = call("report", "--results", teacher, student, "--out", tmp_path / "out")
    assert error_of(done, 2) == (
        "error: small: tasks.sums.shots is 8, the teacher's 5. Evaluate both under one protocol; "
        "these results are not compared."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"results": {"sums": {"exact_match": 0.5, "exact_match_stderr": 0.1}}},
            "small.json: sums has 'exact_match' without a filter, as lm-eval wrote it before "
            "version 0.4. Evaluate with lm-eval 0.4.3 or later.",
        ),
        (
            {"samples": None},
            "sums: neither samples nor n-samples say how many items it has. "
            "Evaluate with lm-eval 0.4.3 or later, and --log_samples.",
        ),
    ],
)
def test_results_of_old_versions_are_told_as_such(
    call: Any, tmp_path: Path, error_of: Any, changes: dict[str, Any], message: str
) -> None:
    teacher = results_file(tmp_path / "teacher.json", "big", 38)
    student = results_file(tmp_path / "small.json", "small", 20, **changes)
    done = call("report", "--results", teacher, student, "--out", tmp_path / "out")
    assert error_of(done, 2).endswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--results", "a.json"], "error: --results: give the teacher's results file, then"),
        (["a.yaml", "b.yaml"], "error: report: 2 sources. Give one recipe,"),
        (
            ["--results", "a.json", "b.json", "--set", "seed=1"],
            "error: --run, --set, --full, --replace:",
        ),
        (["--results", "a.json", "b.json"], "error: a.json: no such file."),
        ([], "error: report: 0 sources. Give one recipe,"),
        (["small.yaml", "--margin", "0.1"], "error: --out, --margin: a recipe's report lies"),
        (["small.yaml", "--items", "0"], "error: --items: it is for --results. A run's report has"),
        (["teacher", "small.yaml"], "error: small.yaml: no run directory."),
        (["teacher"], "error: teacher: no recipe.yaml there."),
        (["--published", "--out", "teacher/.."], "error: --out: teacher/.. holds other files"),
    ],
)
def test_wrong_usage_gets_one_line(
    call: Any, error_of: Any, arguments: list[str], message: str
) -> None:
    assert error_of(call("report", *arguments), 2).startswith(message)


def test_published_rows_stand_side_by_side(call: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("report", "--published", "--out", out)
    assert done.exit_code == 0, done.output
    assert "xLSTM-Llama3.1-8B" in done.stdout
    students = json.loads((out / "compare.json").read_text())["students"]
    found = {row["name"]: row for row in students}
    assert found["xLSTM-Llama3.1-8B"]["critical_tolerance"] == 0.0
    assert found["xLSTM-Llama3.1-8B"]["printed_tolerance"] == 0.0
    assert found["LoLCATs"]["worst_drop"] == 1.0
    page = (out / "compare.html").read_text()
    assert "arXiv 2603.15590" in page
    # Written again, it takes its own place.
    assert call("report", "--published", "--out", out).exit_code == 0
