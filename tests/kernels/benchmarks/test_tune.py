"""The tuner finds the fastest exact candidate and writes a table that reads back as it was."""

from __future__ import annotations

import math

import pytest
import torch

tune = pytest.importorskip(
    "xlstm_kernels.benchmarks.tune", reason="triton is not installed", exc_type=ImportError
)

from xlstm_kernels.testing import outputs_and_grads, to_float64  # noqa: E402
from xlstm_kernels.triton import table as triton_table  # noqa: E402
from xlstm_kernels.triton.configs import MLSTMConfig, WindowConfig, mlstm_config  # noqa: E402


def test_the_table_reads_back_as_it_was_written() -> None:
    found: dict = {}
    exec(tune.table_source(triton_table.MLSTM, triton_table.WINDOW, "some GPU"), found)
    assert found["MLSTM"] == triton_table.MLSTM
    assert found["WINDOW"] == triton_table.WINDOW
    assert found["MEASURED_ON"] == "some GPU"


def test_candidates_hold_the_best_so_far_and_vary_one_thing() -> None:
    best = mlstm_config(torch.bfloat16, 128, 128)
    for candidates in tune.mlstm_rounds(128):
        found = candidates(best)
        assert best in found or best.chunk not in tune.CHUNKS
        for config in found:
            assert sum(a != b for a, b in zip(config, best, strict=True)) <= 1
    assert len(list(tune.window_rounds())) == 3


def test_an_inexact_candidate_is_not_timed(device: str) -> None:
    small = tune.draw("window", torch.float32, 16, 4, 12, device)
    truth = outputs_and_grads(tune.exact_operator("window"), to_float64(small))
    exact = tune.operator_with(WindowConfig(16, 4, 1, 4, 1))

    def time(operator: tune.Operator) -> float:
        return tune.time_candidate(operator, small, truth, small, bound=1e-5, repeats=1)

    assert time(lambda **x: 1.001 * exact(**x)) == math.inf
    assert 0 < time(exact) < math.inf


def test_the_shortest_exact_time_wins(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {32: 3.0, 64: 1.0, 128: math.inf}

    def timed(config: MLSTMConfig, *_: object) -> float:
        return times[config.chunk] + config.output.stages

    monkeypatch.setattr(tune, "operator_with", lambda config: config)
    monkeypatch.setattr(tune, "time_candidate", timed)
    best = tune.tune("mlstm", torch.float32, 32, 4, 8, device)
    assert best.chunk == 64
    assert best.output.stages == 1
