"""Read and write saved weights a part of a tensor at a time: memory does not grow with the model.

The safetensors library maps what it reads, which counts as memory of the process, and writes only
what is in memory as a whole. A file is 8 bytes with the size of a JSON header, the header, and the
tensors' bytes (https://github.com/huggingface/safetensors). Here they are read and written in
place.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlstm_distill.artifacts.files import FULL
from xlstm_distill.errors import RunError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LARGEST_HEADER = 2**27
"""Bytes; the library refuses larger ones too (100 MB)."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` counts bytes from the beginning of its file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return self.count * self.dtype.itemsize


class SavedWeights:
    """The weights of a saved model, or of one file, in the order in which they lie on the disk.

    Raises:
        RunError: a file is missing, cut short or no safetensors file.
    """

    def __init__(self, place: Path) -> None:
        single = place.suffix == ".safetensors"
        self.directory = place.parent if single else place
        self.headers: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._open: dict[str, int] = {}
        index = {} if single else _index_of(place)
        files = [place.name] if single else sorted(set(index.values())) or [SINGLE]
        for file in files:
            self._read_header(file)
        for name, file in index.items():
            if name not in self.entries or self.entries[name].file != file:
                raise RunError(
                    f"{place / INDEX}: names {name} in {file}, which does not hold it; make the "
                    "model again, or put its files back."
                )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the numbers `start` to `stop` of a tensor, counted in row-major order: (N,)."""
        entry = self.entries[name]
        stop = entry.count if stop is None else stop
        width = entry.dtype.itemsize
        buffer = torch.empty((stop - start) * width, dtype=torch.uint8)
        view = buffer.numpy().data
        offset, done = entry.start + start * width, 0
        while done < len(view):
            # One call returns 2 GiB at most, and a network's file system may return less.
            count = os.preadv(self._open[entry.file], [view[done:]], offset + done)
            if count == 0:
                raise _cut_short(self.directory / entry.file)
            done += count
        return buffer.view(entry.dtype)

    def _read_header(self, file: str) -> None:
        path = self.directory / file
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise RunError(f"{path}: no such file; the model is not whole.") from None
        weakref.finalize(self, os.close, descriptor)
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise RunError(f"{path}: is no file; the model is not whole.")
        self._open[file] = descriptor
        self.sizes[file] = facts.st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 2 <= length <= min(LARGEST_HEADER, self.sizes[file] - 8):
            raise _cut_short(path)
        # With its length, as `NewWeights` copies both.
        self.headers[file] = os.pread(descriptor, 8 + length, 0)
        try:
            content = json.loads(self.headers[file][8:])
            self.metadata |= content.pop("__metadata__", {})
            found = {name: _entry(file, fact, 8 + length) for name, fact in content.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunError(f"{path}: its header cannot be read; the file is damaged.") from None
        end = 8 + length
        for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].bytes)):
            if entry.start + entry.bytes > self.sizes[file]:
                raise _cut_short(path)
            # The library refuses such files, and a merge would be written like them.
            if entry.start != end:
                raise RunError(f"{path}: {name} does not begin where the tensor before it ends.")
            end += entry.bytes
            if name in self.entries:
                raise RunError(f"{path}: {name} is in {self.entries[name].file} too.")
            self.entries[name] = entry
        if end != self.sizes[file]:
            raise RunError(f"{path}: {self.sizes[file] - end} bytes follow the last tensor.")


def _index_of(directory: Path) -> dict[str, str]:
    """The file of each tensor of a saved model, by the index; empty where there is none."""
    index = directory / INDEX
    if not index.exists():
        return {}
    try:
        content = dict(json.loads(index.read_text())["weight_map"])
        if all(_is_plain(file) for file in content.values()):
            return content
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise RunError(f"{index}: cannot be read; the file is damaged.")


def _is_plain(file: Any) -> bool:
    """Whether this names a file beside the index, and nothing elsewhere."""
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file


def _entry(file: str, fact: Mapping[str, Any], data: int) -> Entry:
    start, stop = fact["data_offsets"]
    entry = Entry(file, DTYPES[fact["dtype"]], tuple(fact["shape"]), data + start)
    if start < 0 or stop - start != entry.bytes:
        raise ValueError("sizes do not fit")
    return entry


def _cut_short(path: Path) -> RunError:
    return RunError(f"{path}: the file is cut short; make it again.")


class NewWeights:
    """Weights that are being written, in the files, order, shapes and dtypes of other ones.

    Bytes that are the same as the source's make the same files, header included.
    """

    def __init__(self, source: SavedWeights, directory: Path) -> None:
        self.source, self.directory = source, directory
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self._missing = {name: entry.count for name, entry in source.entries.items()}
        directory.mkdir(parents=True, exist_ok=True)
        for file, header in source.headers.items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(directory / file, flags, 0o666)
            weakref.finalize(self, os.close, descriptor)
            self._open[file] = descriptor
            self._write(file, memoryview(header), 0)
            os.ftruncate(descriptor, source.sizes[file])
        if (source.directory / INDEX).exists():
            shutil.copyfile(source.directory / INDEX, directory / INDEX)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self.source.entries.values())

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write numbers of a tensor from `start` on; several threads may write at once.

        Raises:
            OSError: the disk is full or failed; the error names the file.
        """
        entry = self.source.entries[name]
        if values.dtype != entry.dtype:
            raise ValueError(f"{name} is {entry.dtype}, not {values.dtype}")
        raw = values.contiguous().view(torch.uint8).numpy().data
        self._write(entry.file, raw, entry.start + start * entry.dtype.itemsize)
        # Two threads that subtract at once would lose one of the two.
        with self._lock:
            self._missing[name] -= values.numel()

    def finish(self) -> None:
        """Check that every number of every tensor was written.

        Raises:
            RunError: one was not: what was never written reads as zeros.
        """
        for name, count in self._missing.items():
            if count:
                raise RunError(f"{self.directory}: {count} numbers of {name} were not written.")

    def _write(self, file: str, view: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._open[file], view[done:], offset + done)
        except OSError as error:
            if error.filename is None and error.errno in FULL:
                error.filename = str(self.directory / file)
            raise


def copy_other_files(source: Path, target: Path) -> None:
    """Copy what belongs to a saved model besides its weights: settings, tokenizer, template."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        weights = path.suffix == ".safetensors" or path.name == INDEX
        if path.is_file() and not weights:
            shutil.copyfile(path, target / path.name)
