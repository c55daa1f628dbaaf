"""The benchmark of merging measures what it says."""

from __future__ import annotations

import sys

import pytest

from xlstm_distill.benchmarks.merging import main


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measurement_measures(tmp_path, capsys):
    folder = tmp_path / "models"
    main([str(folder), "--experts", "2", "--layers", "1", "--vocabulary", "100"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:]]
    assert [row[0] for row in rows] == ["copy of one expert", "linear", "copy of one expert, again"]
    assert all(float(row[2]) > 0 for row in rows)
    assert 0 < float(rows[1][4]) < 3
    assert not folder.exists()
