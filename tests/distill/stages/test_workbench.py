"""What stages share: the kernels that a recipe asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.errors import UserError
from xlstm_distill.recipe.model import Student
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages.workbench import choose_kernels
from xlstm_kernels import dispatch

CPU = torch.device("cpu")


def recipe(backend: str) -> Any:
    return SimpleNamespace(student=Student(backend=backend))


def test_every_mixer_gets_the_recipe_s_kernels(tiny_teacher) -> None:
    student = convert(tiny_teacher(), MixerConfig(window=8))
    assert choose_kernels(student, recipe("torch"), CPU) == "torch"
    assert {mixer.backend for mixer in student.mixers()} == {"torch"}
    # What `auto` stands for is written into manifests, not the word.
    assert choose_kernels(student, recipe("auto"), CPU) in ("torch", "triton")


@pytest.mark.parametrize(
    ("backend", "device", "lines"), [("auto", "cuda", 1), ("torch", "cuda", 0), ("auto", "cpu", 0)]
)
def test_a_gpu_with_plain_torch_is_told_of_the_kernels(
    backend: str, device: str, lines: int, tiny_teacher, monkeypatch
) -> None:
    monkeypatch.setattr(dispatch, "AUTO", "torch")
    student, console = convert(tiny_teacher(), MixerConfig(window=8)), QuietConsole()
    choose_kernels(student, recipe(backend), torch.device(device), console)
    assert len(console.lines) == lines
    assert all("student.backend=triton" in line for line in console.lines)


@pytest.mark.parametrize(
    ("interpreted", "mixer", "reason"),
    [
        ("0", {}, "needs (CUDA tensors|the package triton)"),
        ("1", {"feature_dim": 24}, "has no kernel for Dk=24|needs the package triton"),
        ("1", {"sinks": 65, "window": 128}, "has no kernel for sinks=65|needs the package"),
    ],
)
def test_kernels_that_cannot_run_are_refused_before_training(
    interpreted: str, mixer: dict[str, int], reason: str, tiny_teacher, monkeypatch
) -> None:
    student = convert(tiny_teacher(), MixerConfig(**{"window": 8, **mixer}))
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    with pytest.raises(UserError, match=f"student.backend: 'triton' ({reason})"):
        choose_kernels(student, recipe("triton"), CPU)
