"""The benchmark of the data measures what it says."""

from __future__ import annotations

from pathlib import Path

from xlstm_distill.benchmarks.data import main

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"


def test_the_measurement_measures(capsys):
    assert main([str(TEACHER), "--tokens", "100_000", "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["workers", "reading:", "order"]
    assert "89 rows" in lines[0]  # 25 to train on and 64 held out
