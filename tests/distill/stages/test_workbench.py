"""What stages share: the kernels that a recipe asks for, and the student to train from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from xlstm_distill import MixerConfig, convert
from xlstm_distill.errors import UserError
from xlstm_distill.models.loading import WeightFiles
from xlstm_distill.recipe.model import Student
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.runtime.device import host_memory
from xlstm_distill.stages import workbench
from xlstm_distill.stages.workbench import choose_kernels, refuse_whole_copies, start_student
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


def as_artifact(folder: Path) -> Any:
    return SimpleNamespace(model_path=folder, check_content=lambda name: None)


def launched(kind: DistributedType) -> Any:
    return SimpleNamespace(distributed_type=kind, device=CPU)


@pytest.fixture
def saved(tiny_teacher, tmp_path) -> tuple[Path, Any]:
    """Save a student; return it as well."""
    student = convert(tiny_teacher(), MixerConfig(window=8))
    student.save_pretrained(tmp_path, max_shard_size="50KB")
    return tmp_path, student


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU])
def test_a_whole_student_goes_from_the_file_to_its_device_tensor_by_tensor(
    kind: DistributedType, saved, monkeypatch
) -> None:
    folder, original = saved
    devices: list[torch.device] = []
    read = WeightFiles.read

    def recorded(self: Any, name: str, like: Any, device: torch.device) -> torch.Tensor:
        assert like.is_meta  # no rank holds another copy
        devices.append(device)
        return read(self, name, like, device)

    monkeypatch.setattr(WeightFiles, "read", recorded)
    accelerator = launched(kind)
    student, later = start_student(as_artifact(folder), accelerator)
    assert later is None
    expected = dict(original.named_parameters())
    assert devices == [accelerator.device] * len(expected)
    for name, parameter in student.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name])
        parameter.data.zero_()  # training changes the weights, and never the artifact
    again, _ = start_student(as_artifact(folder), accelerator)
    assert all(torch.equal(value, expected[name]) for name, value in again.named_parameters())


def test_deepspeed_is_refused_where_its_whole_copies_exceed_the_hosts_memory(
    saved, monkeypatch
) -> None:
    folder, original = saved
    numbers = sum(parameter.numel() for parameter in original.parameters())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(workbench, "host_memory", lambda: 8 * 4 * numbers)
    student, later = start_student(as_artifact(folder), launched(DistributedType.DEEPSPEED))
    assert (later, next(student.parameters()).dtype) == (None, torch.float32)
    monkeypatch.setattr(workbench, "host_memory", lambda: 8 * 4 * numbers - 1)
    with pytest.raises(UserError, match=r"8 ranks need .* GB of this machine's memory, and it has"):
        start_student(as_artifact(folder), launched(DistributedType.DEEPSPEED))


def test_the_refusal_says_both_figures(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(
        UserError, match=r"8 ranks need 256\.0 GB .* and it has 200\.0; launch with"
    ):
        refuse_whole_copies(8_000_000_000, 200_000_000_000)
    assert host_memory() > 2**28
