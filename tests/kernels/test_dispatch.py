"""Choosing a backend.

"auto" is Triton on CUDA where its kernels are right, else torch. Triton is imported only when a
call runs it, and a refusal is one clear line.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xlstm_kernels import dispatch, mlstm, mlstm_step, sliding_window_attention, verdicts
from xlstm_kernels.dispatch import choose
from xlstm_kernels.state import MLSTMState
from xlstm_kernels.testing import random_inputs

# One process for both, since starting one takes seconds: torch is imported anew.
WITHOUT_TRITON = """
import importlib.util, sys
import xlstm_kernels, xlstm_kernels.triton.configs
print("triton" in sys.modules)

sys.modules["triton"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
from xlstm_kernels.testing import random_inputs
x = random_inputs(1, 1, 5, 16)
assert xlstm_kernels.mlstm(**x).isfinite().all()
try:
    xlstm_kernels.mlstm(**x, backend="triton")
except ValueError as error:
    print(error)
"""


def test_triton_is_not_imported_and_where_it_is_missing_the_message_says_so() -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, message = done.stdout.splitlines()
    assert imported == "False"
    assert message == (
        "mlstm: backend='triton' needs the package triton, which is not installed; "
        "install it, or use backend='torch'"
    )


def test_auto_on_a_cpu_never_reaches_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xlstm_kernels.triton.mlstm", None)
    monkeypatch.setitem(sys.modules, "xlstm_kernels.triton.window", None)
    monkeypatch.setitem(sys.modules, "xlstm_kernels.triton.step", None)
    monkeypatch.setenv("XLSTM_KERNELS_BACKEND", "triton")  # means CUDA tensors alone
    x = random_inputs(1, 2, 6, 16)
    mlstm(**x)
    sliding_window_attention(x["v"], x["v"], x["v"], window=2, sinks=1)
    mlstm_step(*(t[:, :, 0] for t in x.values()), MLSTMState.zeros(1, 2, 16, 16))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
class TestAutoOnCuda:
    """Without a GPU: the choice looks at a tensor's device and dtype alone."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        facts = {"device": "some GPU", "capability": "9.0", "torch": "2", "triton": "3.9.0"}
        monkeypatch.setattr(verdicts, "machine", lambda index: facts | {"ptxas": "13.4.59"})
        monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path))
        monkeypatch.delenv("XLSTM_KERNELS_BACKEND", raising=False)
        verdicts.forget()

    def chosen(self, dtype: torch.dtype = torch.bfloat16, dim: int = 64) -> str:
        x: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
        return choose("mlstm", "auto", x, x, x, dims={"Dk": dim, "Dv": dim})

    def decide(self, right: bool) -> None:
        asked = verdicts.question("mlstm", torch.bfloat16, {"Dk": 64, "Dv": 64})
        answer = verdicts.Verdict(right, "" if right else "RMS ratio 1.0e-02")
        verdicts.write(asked, verdicts.machine(0), answer)

    def test_kernels_that_are_right_run(self) -> None:
        self.decide(True)
        assert self.chosen() == "triton"

    def test_kernels_that_are_wrong_do_not_run_and_one_warning_says_so(self) -> None:
        self.decide(False)
        with pytest.warns(
            UserWarning, match=r"RMS ratio 1.0e-02 \(some GPU, torch 2, triton 3.9.0"
        ):
            assert self.chosen() == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self.chosen() == "torch"

    def test_a_decided_call_reads_nothing_again(self, tmp_path: Path) -> None:
        self.decide(True)
        assert self.chosen() == "triton"
        verdicts.file_of(
            verdicts.question("mlstm", torch.bfloat16, {"Dk": 64, "Dv": 64}), verdicts.machine(0)
        ).unlink()
        assert not list(tmp_path.iterdir())
        assert self.chosen() == "triton"

    def test_what_triton_has_no_kernel_for_runs_on_torch(self) -> None:
        assert self.chosen(torch.float64) == "torch"
        assert self.chosen(dim=24) == "torch"

    @pytest.mark.parametrize("given", ["torch", "triton"])
    def test_the_environment_overrides_the_verdict(
        self, given: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.decide(given == "torch")
        monkeypatch.setenv("XLSTM_KERNELS_BACKEND", given)
        assert self.chosen() == given

    def test_a_wrong_word_in_the_environment_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XLSTM_KERNELS_BACKEND", "cuda")
        with pytest.raises(
            ValueError, match=r"^XLSTM_KERNELS_BACKEND='cuda' is not allowed; allowed"
        ):
            self.chosen()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
class TestRefusals:
    def test_tensors_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(
            ValueError,
            match=r"^mlstm: backend='triton' needs CUDA tensors, but these are on cpu; move",
        ):
            mlstm(**random_inputs(1, 1, 5, 16), backend="triton")

    def test_float64(self, device: str) -> None:
        x = {name: t.double().to(device) for name, t in random_inputs(1, 1, 5, 16).items()}
        with pytest.raises(
            ValueError,
            match=r"^mlstm: backend='triton' computes in float32; for float64 inputs use",
        ):
            mlstm(**x, backend="triton")

    def test_head_dims(self, device: str) -> None:
        x = {name: t.to(device) for name, t in random_inputs(1, 1, 5, 16, 24).items()}
        with pytest.raises(
            ValueError, match=r"has no kernel for Dv=24; allowed: 16, 32, 64, 128, 256$"
        ):
            mlstm(**x, backend="triton")

    def test_sinks(self, device: str) -> None:
        x = torch.zeros(1, 1, 5, 16, device=device)
        with pytest.raises(ValueError, match=r"has no kernel for sinks=65; at most 64"):
            sliding_window_attention(x, x, x, window=2, sinks=65, backend="triton")

    def test_a_backend_that_only_mlstm_has(self) -> None:
        x = torch.zeros(1, 1, 5, 16)
        with pytest.raises(
            ValueError, match=r"backend='mlstm_kernels' is unknown; allowed: auto, torch, triton$"
        ):
            sliding_window_attention(x, x, x, window=2, sinks=1, backend="mlstm_kernels")


@pytest.mark.slow
def test_a_choice_is_a_constant_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("XLSTM_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def named(x: torch.Tensor) -> torch.Tensor:
        return x + (choose("mlstm", "triton", x, x, x, dims={"Dk": 16, "Dv": 16}) == "triton")

    def automatic(x: torch.Tensor) -> torch.Tensor:
        return x + dispatch.passes_check("mlstm", torch.bfloat16, (("Dk", 16), ("Dv", 16)), 0)

    for function in (named, automatic):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert compiled(torch.zeros(1)).item() == 1.0
