"""Checkpoints of a training: a folder each, with one file for every rank, published by rename.

They are checked when they are read, and only the newest few are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from xlstm_distill.artifacts.files import flush, flush_directory, flush_upwards
from xlstm_distill.artifacts.hashing import crc32
from xlstm_distill.errors import RunError
from xlstm_distill.runtime.ranks import (
    all_agree,
    gathered,
    is_main_process,
    process_count,
    process_index,
    wait_for_everyone,
)

INDEX = "checkpoint.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: the next step, facts its writer noted, and each rank's tensors."""

    path: Path
    index: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The next step to do."""
        return self.index["step"]

    @property
    def processes(self) -> int:
        """Number of processes that wrote it."""
        return self.index["processes"]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the writer noted beside the tensors."""
        return self.index["facts"]

    def tensors(self, process: int) -> dict[str, Tensor]:
        """Read the tensors that a process wrote, on the CPU."""
        return load_file(self.path / _file(process))

    def damage(self, process: int) -> str | None:
        """Say what is wrong with a process's file; None if nothing is."""
        path, expected = self.path / _file(process), self.index["files"][_file(process)]
        if not path.is_file():
            return f"{path}: missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path}: {size} bytes, it was written with {expected['bytes']}"
        if crc32(path) != expected["crc32"]:
            return f"{path}: its checksum is not the one it was written with"
        return None


class Checkpoints:
    """The checkpoints of one training, at most `keep` of them.

    All ranks call `save` and `latest` at the same time.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep
        self._reachable = False  # whether the folders above are known to be on the disk

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint with which `step` is next to do; drop the oldest beyond `keep`.

        `tensors` are this rank's. The checkpoint is published when all ranks have written theirs.
        """
        partial = self.directory / f".{_name(step)}.partial"
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        wait_for_everyone()
        file = partial / _file(process_index())
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, file)
        flush(file)
        # Each rank reads its own file again; rank 0 alone would read the whole checkpoint.
        own = {"bytes": file.stat().st_size, "crc32": crc32(file)}
        # Not through files: on NFS rank 0 may not see yet what another machine wrote.
        all_files = gathered(own)
        if is_main_process():
            files = {_file(process): known for process, known in enumerate(all_files)}
            self._publish(partial, step, files, facts)
        wait_for_everyone()

    def _publish(
        self,
        partial: Path,
        step: int,
        files: Mapping[str, Mapping[str, int]],
        facts: Mapping[str, Any],
    ) -> None:
        """Write the index, rename the folder into place and remove old checkpoints."""
        index = {
            "format": FORMAT,
            "step": step,
            "processes": process_count(),
            "files": files,
            "facts": dict(facts),
        }
        (partial / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
        flush(partial / INDEX)
        flush_directory(partial)
        final = self.directory / _name(step)
        # A damaged checkpoint of this step may be there, refused when this run began.
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        # The new name must be on the disk before an older checkpoint goes.
        flush_directory(self.directory)
        if not self._reachable:
            # The training made its own folder, and perhaps the one above (RUN/training).
            flush_upwards(self.directory.parent, self.directory.parent.parent)
            self._reachable = True
        for path in self._paths()[: -self.keep]:
            shutil.rmtree(path)

    def latest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """Find the newest checkpoint that no rank finds damaged; None when there is none at all.

        Damaged ones are named through `say`.

        Raises:
            RunError: there are checkpoints and every one is damaged.
        """
        refused = []
        for path in reversed(self._paths()):
            checkpoint, damage = _read(path)
            if all_agree(checkpoint is not None):
                return checkpoint
            refused.append(damage or f"{path}: another process found it damaged")
            say(f"checkpoint refused: {refused[-1]}")
        # Starting over in silence could cost days of training.
        if refused:
            raise RunError(
                f"no checkpoint can be used: {refused[0]}. Delete {self.directory} to start over."
            )
        return None

    def clean(self) -> None:
        """Remove what a killed `save` left; no other process may be at this training."""
        if is_main_process():
            for partial in self.directory.glob(".step-*.partial"):
                shutil.rmtree(partial, ignore_errors=True)

    def _paths(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        found = self.directory.glob("step-*")
        return sorted(path for path in found if (path / INDEX).is_file())


def _read(path: Path) -> tuple[Checkpoint | None, str | None]:
    """Read and check a checkpoint; returns either the checkpoint or what is wrong with it."""
    try:
        checkpoint = Checkpoint(path, json.loads((path / INDEX).read_text()))
        damage = _damage(checkpoint)
    except OSError as error:
        damage = f"{error.filename or path}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        damage = f"{path / INDEX}: not the index of a checkpoint"
    return (checkpoint, None) if damage is None else (None, damage)


def _damage(checkpoint: Checkpoint) -> str | None:
    """Check the index and the files that this rank will read; None if nothing is wrong.

    These are its own and rank 0's, or all of them if another number of processes wrote.
    """
    found = checkpoint.index["format"]
    if found != FORMAT:
        return f"{checkpoint.path}: format {found}, this version reads {FORMAT}"
    if not (isinstance(checkpoint.step, int) and isinstance(checkpoint.facts, dict)):
        return f"{checkpoint.path / INDEX}: not the index of a checkpoint"
    same = checkpoint.processes == process_count()
    for process in {0, process_index()} if same else range(checkpoint.processes):
        damage = checkpoint.damage(process)
        if damage is not None:
            return damage
    return None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _file(process: int) -> str:
    return f"process-{process:05d}.safetensors"
