"""Checkpoints: published whole, checked when read, the newest few kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from xlstm_distill.errors import RunError
from xlstm_distill.training.checkpoints import INDEX, Checkpoints


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "weight/a": torch.full((64,), float(step)),
        "generator/cpu": torch.arange(8, dtype=torch.uint8),
    }


def test_the_newest_whole_checkpoint_is_used_and_damage_is_named(tmp_path):
    checkpoints, said = Checkpoints(tmp_path, keep=2), []
    for step in (1, 2, 3):
        checkpoints.save(step, tensors(step), {"note": step})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    file = tmp_path / "step-00000003" / "process-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    found = checkpoints.latest(said.append)
    assert (found.step, found.facts["note"]) == (2, 2)
    assert torch.equal(found.tensors(0)["weight/a"], tensors(2)["weight/a"])
    size = file.stat().st_size
    assert said == [f"checkpoint refused: {file}: {size} bytes, it was written with {size + 4}"]
    other = tmp_path / "step-00000002" / "process-00000.safetensors"
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    with pytest.raises(
        RunError, match=r"no checkpoint can be used: .*step-00000003.* Delete .* to start over"
    ):
        checkpoints.latest(said.append)
    assert "its checksum is not the one it was written with" in said[-1]


@pytest.mark.parametrize(
    "content", ["", '{"step": 3, "proc', "[]", "{}", '{"format": 1, "step": "3", "processes": 1}']
)
def test_a_damaged_index_is_named_and_the_checkpoint_before_it_is_used(content, tmp_path):
    checkpoints, said = Checkpoints(tmp_path, keep=2), []
    for step in (2, 3):
        checkpoints.save(step, tensors(step), {})
    (tmp_path / "step-00000003" / INDEX).write_text(content)
    assert checkpoints.latest(said.append).step == 2
    assert said == [
        f"checkpoint refused: {tmp_path / 'step-00000003' / INDEX}: not the index of a checkpoint"
    ]
    (tmp_path / "step-00000002" / INDEX).write_text(content)
    with pytest.raises(
        RunError, match=r"no checkpoint can be used: .*step-00000003.* Delete .* to start over"
    ):
        checkpoints.latest(said.append)


def test_a_checkpoint_and_its_name_are_on_the_disk_before_an_older_one_goes(tmp_path, monkeypatch):
    done, fsync = [], os.fsync

    def watched(descriptor):
        there = sorted(p.name for p in tmp_path.iterdir())
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append((path.relative_to(tmp_path.resolve()).as_posix(), there))
        fsync(descriptor)

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tensors(1), {})
    monkeypatch.setattr(os, "fsync", watched)
    checkpoints.save(2, tensors(2), {})
    partial = ".step-00000002.partial"
    assert [name for name, _ in done] == [
        f"{partial}/process-00000.safetensors",
        f"{partial}/{INDEX}",
        partial,
        ".",
    ]
    assert done[-1][1] == ["step-00000001", "step-00000002"]


def test_the_folders_of_a_new_training_are_on_the_disk_with_its_first_checkpoint(
    tmp_path, monkeypatch
):
    flushed, fsync = [], os.fsync

    def watched(descriptor):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    work = tmp_path.resolve() / "training" / "align"
    Checkpoints(work, keep=1).save(1, tensors(1), {})
    assert flushed[-3:] == [work, work.parent, work.parent.parent]


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, tensors(5), {})
    partial = tmp_path / ".step-00000009.partial"
    partial.mkdir()
    (partial / "process-00000.safetensors").write_bytes(b"half")
    assert checkpoints.latest(print).step == 5
    checkpoints.clean()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    checkpoints.save(9, tensors(9), {})
    assert checkpoints.latest(print).step == 9
