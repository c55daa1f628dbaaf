"""The benchmark times what agrees with its reference, and refuses the rest."""

from __future__ import annotations

import pytest

from xlstm_kernels import bench

SMALL = ["--batch", "1", "--tokens", "40", "--heads", "2", "--groups", "1", "--key-dim", "8", "--window", "8"]


def test_every_operator_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*SMALL, "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["mlstm", "sliding_window_attention", "dense"]
    assert all("forward + backward" in line for line in lines)


def test_a_wrong_operator_is_not_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    exact = bench.mlstm
    monkeypatch.setattr(bench, "mlstm", lambda *args, **settings: 1.001 * exact(*args, **settings))
    assert bench.main([*SMALL, "--repeats", "1"]) == 1
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("mlstm ")
    assert "not timed: RMS ratio 1.0e-03" in first
    assert "ms" in others[0]
