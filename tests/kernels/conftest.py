"""Where the Triton kernels run in tests: on a GPU, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() and os.environ.setdefault("TRITON_INTERPRET", "1") == "1":
    # Triton decides between compiler and interpreter when it is imported, and transformers, which
    # the tests of other directories import, imports it. So forget Triton and what is built on it;
    # its compiled part (triton._C) cannot be loaded twice.
    rooms = ("triton", "xlstm_kernels.triton", "xlstm_kernels.benchmarks")
    for name in list(sys.modules):
        if name.startswith("triton._C"):
            continue
        if any(name == room or name.startswith(f"{room}.") for room in rooms):
            del sys.modules[name]


@pytest.fixture(scope="session")
def device() -> str:
    """Device of the Triton tests' tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu_arithmetic(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Make the interpreter round as a GPU does.

    The set collects the precisions of products; it stays empty on a GPU.
    """
    if torch.cuda.is_available():
        return set()
    path = Path(__file__).parent.parent / "shims/triton_interpreter.py"
    spec = importlib.util.spec_from_file_location("triton_interpreter", path)
    assert spec is not None
    assert spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    return shim.use_gpu_arithmetic(monkeypatch)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and torch.empty_like return with NaN.

    So what a kernel does not write shows in the results.
    """
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def nan_filled(*args: object, allocate=allocate, **settings: object) -> torch.Tensor:
            x = allocate(*args, **settings)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(2**30))

        monkeypatch.setattr(torch, name, nan_filled)
