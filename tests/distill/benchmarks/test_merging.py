"""The benchmark of merging measures what it says."""

from __future__ import annotations

import sys

import pytest

from xlstm_distill.benchmarks import merging


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measurement_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "LAYER", {"mlp.up_proj": (merging.HIDDEN, 8)})
    for seed, name in enumerate(("base", "0", "1")):
        merging.write_model(tmp_path / name, seed, layers=5, vocabulary=10)
    model = 2 * merging.HIDDEN * (10 + 5 * 8)  # bytes, in bf16
    copied = merging.copy(tmp_path)
    assert copied["bytes"] == pytest.approx(2 * model, rel=0.01)
    merged = merging.merge(tmp_path, "ties", 2)
    assert merged["bytes"] == 4 * model  # base and two experts read, one written
    assert 0 < merged["seconds"] <= merged["with_flush"]
    assert merged["processor"] > 0
    assert 2**26 < merged["peak"] < 3 * 2**30
    # The embedding, four layers, and the fifth.
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 3
    cells = merging.line("ties", merged).split("|")
    assert float(cells[7]) == pytest.approx(merged["peak"] / 2**30, abs=0.01)
