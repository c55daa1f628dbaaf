"""The benchmark of many answers at once: what it measures, and the table that it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xlstm_distill.benchmarks import serving

TINY = ["--model", "tiny", "--prompt", "20", "--tokens", "4", "--window", "8"]
SIZES = ["--sequences", "1", "3", "--rounds", "1", "--engines", "generate"]


def test_each_number_of_sequences_is_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path), *TINY, *SIZES]
    serving.save_models(serving.parse(arguments))
    capsys.readouterr()
    for name in serving.VARIANTS:
        assert serving.main([*arguments, "--only", "generate", name]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(row["model"], row["sequences"]) for row in rows] == [(name, 1), (name, 3)]
        assert all(row["whole"] > 0 and row["first"] > 0 for row in rows)


def test_ratios_are_of_one_round() -> None:
    seconds = {"student": (1.0, 8.0), "attention": (2.0, 4.0)}
    rows = [
        {"engine": "vllm", "model": model, "sequences": 8, "whole": whole, "round": number}
        for model, times in seconds.items()
        for number, whole in enumerate(times)
    ]
    # 16 tokens of 8 sequences; twice as fast in the first round, half as fast in the second.
    header, _, line = serving.table(rows, tokens=16).splitlines()
    assert header.endswith("| attention, vllm | student, vllm | student / attention, vllm |")
    assert line == "| 8 | 48 (32 to 64) | 72 (16 to 128) | 1.25 (0.50 to 2.00) |"


def test_a_process_that_fails_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text("{}")
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention/config.json").write_text("{}")
    assert serving.main([str(tmp_path), *TINY, *SIZES]) == 1
    assert "generate, student: " in capfd.readouterr().err
