"""The tuner finds the fastest exact candidate and writes a table that reads back as it was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

tune = pytest.importorskip(
    "xlstm_kernels.benchmarks.tune", reason="triton is not installed", exc_type=ImportError
)

from xlstm_kernels.benchmarks import candidates  # noqa: E402
from xlstm_kernels.benchmarks.parts import UNFINISHED  # noqa: E402
from xlstm_kernels.triton import table as triton_table  # noqa: E402
from xlstm_kernels.triton.configs import MLSTMConfig, WindowConfig, mlstm_config  # noqa: E402


def test_the_table_reads_back_as_it_was_written() -> None:
    found: dict = {}
    exec(tune.table_source(triton_table.MLSTM, triton_table.WINDOW, "some GPU"), found)
    assert found["MLSTM"] == triton_table.MLSTM
    assert found["WINDOW"] == triton_table.WINDOW
    assert found["MEASURED_ON"] == "some GPU"


def test_candidates_vary_one_thing() -> None:
    best = mlstm_config(torch.bfloat16, 128, 128)
    rounds = list(candidates.mlstm_rounds(128))
    assert [kernels for _, kernels in rounds][2:] == [
        (name,) for name in candidates.KERNELS.values()
    ]
    for make, _ in rounds:
        for config in make(best):
            assert sum(a != b for a, b in zip(config, best, strict=True)) <= 1
    assert len(list(candidates.window_rounds(128))) == 4


@pytest.mark.parametrize(("dim", "expected"), [(16, {2, 4, 8}), (32, {2, 4, 8}), (64, {4, 8})])
def test_two_warps_are_tried_where_heads_are_narrow(dim: int, expected: set[int]) -> None:
    best = mlstm_config(torch.bfloat16, dim, dim)
    rounds = zip(candidates.mlstm_rounds(dim), MLSTMConfig._fields, strict=True)
    for (make, kernels), name in rounds:
        if kernels:
            assert {getattr(config, name).warps for config in make(best)} == expected
    window = WindowConfig(64, 4, 1, 4, 1, 4, 32)
    _, *by_warps = candidates.window_rounds(dim)
    fields = ("warps", "grad_warps", "key_grad_warps")
    for (make, _), field in zip(by_warps, fields, strict=True):
        assert {getattr(config, field) for config in make(window)} == expected


@pytest.mark.parametrize(("version", "deepest"), [("3.6.0", {1}), ("3.8.0", {1, 2, 3})])
def test_no_pipeline_is_tried_where_triton_makes_wrong_code_of_it(
    version: str, deepest: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "triton_version", lambda: version)
    best = mlstm_config(torch.bfloat16, 64, 64)
    for (make, kernels), name in zip(candidates.mlstm_rounds(64), MLSTMConfig._fields, strict=True):
        if kernels:
            tried = {getattr(config, name).stages for config in make(best)}
            assert tried == (deepest if name in candidates.FED_FROM_REGISTERS else {1, 2, 3})


@pytest.fixture
def small(device: str) -> tune.Case:
    return tune.make_case("window", "float32", 16, [4], 12, device)


def test_an_inexact_candidate_is_not_timed(small: tune.Case) -> None:
    exact = tune.operator_with(WindowConfig(16, 4, 1, 4, 1, 4, 16))

    def timed(operator: tune.Operator, *kernels: str) -> float:
        return tune.time_candidate(
            operator, small.small, small.truth, small.large, 1e-5, kernels, repeats=1
        )

    assert timed(lambda **x: 1.001 * exact(**x)) == math.inf
    assert 0 < timed(exact, "window_kernel") < timed(exact) < math.inf


def test_the_shortest_exact_time_wins_and_is_not_timed_again(
    small: tune.Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times, measured = {16: 3.0, 32: 1.0, 64: math.inf, 128: 2.0}, []

    class Timed(tune.Tuner):
        def _measure(self, case: tune.Case, config: WindowConfig, kernels: object) -> float:
            measured.append(config)
            return times[config.block] + config.warps

    def run(ends: float) -> WindowConfig:
        tuner = Timed(tmp_path, candidates.Pruner(0, 0), ends, None)
        return tuner.tune(small, WindowConfig(16, 8, 1, 8, 1, 8, 16))

    assert run(ends=0.0) == WindowConfig(16, 8, 1, 8, 1, 8, 16)  # no time
    best = run(ends=math.inf)
    assert (best.block, best.warps) == (32, 2)
    count = len(measured)
    assert run(ends=math.inf) == best  # from what is kept
    assert len(measured) == count


def test_what_does_not_fit_is_not_compiled_again(small: tune.Case, tmp_path: Path) -> None:
    asked = []

    class Drops(candidates.Pruner):
        def fitting(self, *where: object) -> list[WindowConfig]:
            asked.extend(where[3])
            return [config for config in where[3] if config.block < 64]

    class Timed(tune.Tuner):
        def _measure(self, case: tune.Case, config: WindowConfig, kernels: object) -> float:
            return 1.0 / config.block  # larger blocks would win

    def run(ends: float) -> tuple[WindowConfig, bool]:
        tuner = Timed(tmp_path, Drops(0, 0), ends, None)
        return tuner.tune(small, WindowConfig(16, 8, 1, 8, 1, 8, 16)), tuner.stopped

    assert run(ends=0.0) == (WindowConfig(16, 8, 1, 8, 1, 8, 16), True)
    assert not asked  # out of time
    best, stopped = run(ends=math.inf)
    assert (best.block, stopped) == (32, False)
    assert asked
    asked.clear()
    with (tmp_path / "tuned.jsonl").open("a") as file:
        file.write('{"key": "killed in the middle of')
    for ends in (math.inf, 0.0):  # all is known: no time is needed
        assert run(ends) == (best, False)
    assert not asked


def test_a_tuner_without_time_says_that_it_has_not_ended(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--processes", "0", "--out", str(tmp_path), "--budget-s"]
    assert tune.main([*arguments, "1e-6"]) == UNFINISHED
    assert not (tmp_path / "table.py").exists()


def test_a_candidate_that_ended_the_process_is_not_tried_again(
    small: tune.Case, tmp_path: Path
) -> None:
    class Dying(tune.Tuner):
        def _measure(self, case: tune.Case, config: WindowConfig, kernels: object) -> float:
            raise SystemExit

    config = WindowConfig(16, 4, 1, 4, 1, 4, 16)
    with pytest.raises(SystemExit):
        Dying(tmp_path, candidates.Pruner(0, 0), math.inf, None).timed(small, config, ())
    again = Dying(tmp_path, candidates.Pruner(0, 0), math.inf, None)
    assert again.timed(small, config, ()) == math.inf


@pytest.mark.slow
def test_what_spills_or_does_not_fit_is_dropped_before_it_is_timed() -> None:
    good, tight = WindowConfig(64, 4, 1, 8, 1, 8, 64), WindowConfig(128, 4, 3, 4, 3, 4, 128)
    piped = good._replace(grad_stages=2)  # Triton lets its products run on
    # A spawned process reads this when it imports Triton.
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        pruner = candidates.Pruner(1, 90)
        tried = [good, tight, piped]
        found = pruner.fitting("window", "bfloat16", 128, tried, ("key_value_grad_kernel",))
        pruner.close()
    assert found == ([good, piped] if candidates.pipeline_is_sound() else [good])
