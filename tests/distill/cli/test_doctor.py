"""`doctor`: what it prints, its JSON, its exit codes and the options it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from xlstm_distill.cli.app import app
from xlstm_kernels import verdicts
from xlstm_kernels.verdicts import Verdict

FACTS = {"device": "some GPU", "capability": "9.0", "triton": "3.6.0", "ptxas": "12.8.93"}


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("XLSTM_KERNELS_BACKEND", raising=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which the kernels of head dim 64 are wrong."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(verdicts, "machine", lambda index: FACTS)
    right = Verdict(True, ratios={"h": 2e-3}, bound=8e-3, milliseconds={"triton": 1.0})
    wrong = Verdict(False, "RMS ratio to float64 over 8e-03: dk 2.1e-02", final=False)
    monkeypatch.setattr(
        verdicts,
        "ask",
        lambda asked, index, runner, listener: [
            wrong if 64 in dict(x.dims).values() else right for x in asked
        ],
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_all_is_well_and_torch_runs() -> None:
    result = call()
    assert result.exit_code == 0
    assert "student.backend: auto means torch: there is no CUDA device" in result.stdout


def test_a_wrong_kernel_is_shown_with_what_to_do(gpu: None) -> None:
    pytest.importorskip("triton")
    result = call("--dim", "64")
    assert result.exit_code == 1
    assert "GPU 0: some GPU, sm_90, ptxas 12.8.93" in result.stdout
    assert "WRONG  mlstm bfloat16 Dk=64 Dv=64: RMS ratio to float64 over 8e-03: dk" in result.stdout
    assert "- ptxas 12.8.93 can make wrong code" in result.stdout
    found = json.loads(call("--json").stdout)
    assert found["healthy"]
    assert found["auto"] == "triton"
    assert len(found["devices"][0]["verdicts"]) == 13


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dim", "96"], "--dim: 96 is not allowed. Allowed: 16, 32, 64, 128, 256."),
        (["--dtype", "int8"], "--dtype: 'int8' is not allowed. Allowed: bfloat16, float32"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments: list[str], words: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_wrong_word_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLSTM_KERNELS_BACKEND", "cuda")
    result = call()
    assert result.exit_code == 2
    assert "XLSTM_KERNELS_BACKEND='cuda' is not allowed" in result.stderr
