"""What stages share: the student to train from."""

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
from xlstm_distill.runtime.device import host_memory
from xlstm_distill.stages import workbench
from xlstm_distill.stages.workbench import refuse_whole_copies, start_student

CPU = torch.device("cpu")


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
