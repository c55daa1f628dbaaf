"""Checkpoints of a training: published by rename, checked when read, kept to a number; one file a process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from xlstm_distill.artifacts.hashing import crc32
from xlstm_distill.errors import RunError
from xlstm_distill.runtime.ranks import (
    all_agree,
    is_main_process,
    process_count,
    process_index,
    wait_for_everyone,
)

INDEX = "checkpoint.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: the next step to do, facts its writer noted, and a file of tensors for each process."""

    path: Path
    index: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The first step that is not in it."""
        return self.index["step"]

    @property
    def processes(self) -> int:
        """Processes that wrote it."""
        return self.index["processes"]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the writer noted beside the tensors."""
        return self.index["facts"]

    def tensors(self, process: int) -> dict[str, Tensor]:
        """Read the tensors that a process wrote, on the CPU."""
        return load_file(self.path / _file(process))

    def damage(self, process: int) -> str | None:
        """Say what is wrong with a process's file, None if nothing is."""
        path, expected = self.path / _file(process), self.index["files"][_file(process)]
        if not path.is_file():
            return f"{path}: missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{path}: {size} bytes, it was written with {expected['bytes']}"
        if crc32(path) != expected["crc32"]:
            return f"{path}: its checksum is not the one it was written with"
        return None


class Checkpoints:
    """The checkpoints of one training, newest last, at most `keep` of them. All processes call the same methods."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write this process's tensors; when all have, publish the checkpoint and drop the oldest beyond `keep`."""
        partial = self.directory / f".{_name(step)}.partial"
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        wait_for_everyone()
        file = partial / _file(process_index())
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file
        )
        _flush(file)
        file.with_suffix(".json").write_text(
            json.dumps({"bytes": file.stat().st_size, "crc32": crc32(file)})
        )
        wait_for_everyone()
        if is_main_process():
            self._publish(partial, step, facts)
        wait_for_everyone()

    def _publish(self, partial: Path, step: int, facts: Mapping[str, Any]) -> None:
        files = {}
        for process in range(process_count()):
            note = (partial / _file(process)).with_suffix(".json")
            files[_file(process)] = json.loads(note.read_text())
            note.unlink()
        index = {
            "format": FORMAT,
            "step": step,
            "processes": process_count(),
            "files": files,
            "facts": dict(facts),
        }
        (partial / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
        _flush(partial / INDEX)
        _flush_directory(partial)
        final = self.directory / _name(step)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush_directory(self.directory)  # before an older one goes
        for path in self._paths()[: -self.keep]:
            shutil.rmtree(path)

    def latest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """Find the newest whole checkpoint; None when there is none at all. Damaged ones are named through `say`.

        Raises:
            RunError: there are checkpoints and every one is damaged.
        """
        found = []
        for path in reversed(self._paths()):
            checkpoint, damage = _read(path)
            if all_agree(checkpoint is not None):
                return checkpoint
            found.append(damage or f"{path}: another process found it damaged")
            say(f"checkpoint refused: {found[-1]}")
        if found:
            raise RunError(
                f"no checkpoint can be used: {found[0]}. Delete {self.directory} to start over."
            )
        return None

    def clean(self) -> None:
        """Remove what a save that was killed has left; nobody else may be at this training."""
        if is_main_process():
            for partial in self.directory.glob(".step-*.partial"):
                shutil.rmtree(partial, ignore_errors=True)

    def _paths(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(
            p
            for p in self.directory.iterdir()
            if p.name.startswith("step-") and (p / INDEX).is_file()
        )


def _read(path: Path) -> tuple[Checkpoint | None, str | None]:
    """Read and check a checkpoint: it, or what is wrong with it."""
    try:
        checkpoint = Checkpoint(path, json.loads((path / INDEX).read_text()))
        damage = _own_damage(checkpoint)
    except OSError as error:
        damage = f"{error.filename or path}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        damage = f"{path / INDEX}: not the index of a checkpoint"
    return (checkpoint, None) if damage is None else (None, damage)


def _own_damage(checkpoint: Checkpoint) -> str | None:
    """Check the index, and the files this process will read: its own, or all if another number of processes wrote."""
    if checkpoint.index["format"] != FORMAT:
        return (
            f"{checkpoint.path}: format {checkpoint.index['format']}, this version reads {FORMAT}"
        )
    if not (isinstance(checkpoint.step, int) and isinstance(checkpoint.facts, dict)):
        return f"{checkpoint.path / INDEX}: not the index of a checkpoint"
    same = checkpoint.processes == process_count()
    files = {0, process_index()} if same else range(checkpoint.processes)
    return next((damage for process in files if (damage := checkpoint.damage(process))), None)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _file(process: int) -> str:
    return f"process-{process:05d}.safetensors"


def _flush(path: Path) -> None:
    """Make sure that a file is on the disk before the checkpoint's name says so."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_directory(path: Path) -> None:
    """Make sure that the names in a directory are on the disk, where the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
