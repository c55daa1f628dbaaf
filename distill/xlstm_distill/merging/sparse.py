"""Files of sparse changes: sorted positions and a value for each, by tensor, in a safetensors file.

For a tensor NAME of a model the file holds `NAME.gaps`, `NAME.values` and `NAME.ends`. Positions
count from the start of their block (`streaming.BLOCK`) and are stored as gaps of one byte: 255 adds
255 and is no position, any other byte adds itself, and one for the position. Row b of `NAME.ends`
says where block b ends: in bytes of gaps, and in values. A matrix may be held as two factors
instead, `NAME.left` and `NAME.right` (`low_rank`). The metadata has a checksum of all the rest.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlstm_distill.errors import RunError, UserError
from xlstm_distill.merging.files import DTYPES, SavedWeights
from xlstm_distill.merging.low_rank import matrix_of, product, rows_of
from xlstm_distill.merging.streaming import Block

SKIP = 255
ALIGN = 8
"""Tensors begin at multiples of this: the library cannot read others in place."""
HEADER_BYTES, METADATA_BYTES = 280, 2**11
"""Room in the header for one tensor, besides its name, and for metadata; spaces fill the rest."""
PIECE = 2**22
CODES = {dtype: code for code, dtype in DTYPES.items()}
PARTS = ("gaps", "values", "ends")
FACTORS = ("left", "right")
CHECKSUM = "sha256"


def encode(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Code rising positions as gaps."""
    steps = np.diff(positions, prepend=-1) - 1
    skips, rest = np.divmod(steps, SKIP)
    coded = np.full(len(steps) + int(skips.sum()), SKIP, dtype=np.uint8)
    coded[np.cumsum(skips + 1) - 1] = rest
    return coded


def decode(gaps: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Read positions back."""
    is_position = gaps != SKIP
    reached = np.cumsum(gaps, dtype=np.int64)[is_position]
    return reached + np.arange(len(reached))


@dataclass(frozen=True)
class Changes:
    """Values at some positions of a block, both (K,)."""

    positions: NDArray[np.int64]
    values: Tensor


class SparseFile:
    """Reads a file of sparse changes of some format, block by block.

    Raises:
        UserError: the file is of another format.
        RunError: the file is missing or damaged.
    """

    def __init__(self, path: Path, *formats: str) -> None:
        self.path = path
        self.weights = SavedWeights(path)
        self.metadata = self.weights.metadata
        if self.metadata.get("format") not in formats:
            raise UserError(f"{path}: is no {formats[0]!r}; make it again with this version.")
        self.ends: dict[str, Tensor] = {}
        self.factors: list[str] = []
        for key in self.weights.entries:
            name, _, part = key.rpartition(".")
            if part == "ends":
                self.ends[name] = self.weights.read(key).reshape(-1, 2)
            if part == FACTORS[0]:
                self.factors.append(name)
        expected = {f"{name}.{part}" for name in self.ends for part in PARTS}
        expected |= {f"{name}.{part}" for name in self.factors for part in FACTORS}
        if set(self.weights.entries) != expected:
            raise RunError(f"{path}: holds other tensors than it should; make it again.")

    def check(self) -> None:
        """Compare the checksum; files of before there was one pass. Reads the whole file.

        Raises:
            RunError: the file is damaged.
        """
        (head,) = self.weights.headers.values()
        content = json.loads(head[8:])
        known = content["__metadata__"].pop(CHECKSUM, None)
        if known is None:
            return
        found = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(len(head))
            while piece := file.read(PIECE):
                found.update(piece)
        found.update(_json(content))
        if found.hexdigest() != known:
            raise RunError(
                f"{self.path}: its checksum is wrong, the file is damaged; make it again."
            )

    def changes(self, block: Block) -> Changes | None:
        """The changes of a block of a tensor; None where there are none."""
        if block.name in self.factors:
            return self._multiplied(block)
        return self._stored(block.name, block.number)

    def _multiplied(self, block: Block) -> Changes:
        right = self._matrix(block.name, FACTORS[1])
        rank, columns = right.shape
        first, last = rows_of(block, columns)
        left = self.weights.read(f"{block.name}.{FACTORS[0]}", first * rank, last * rank)
        positions = np.arange(block.stop - block.start, dtype=np.int64)
        return Changes(positions, product(left.reshape(-1, rank), right, block))

    def _matrix(self, name: str, part: str) -> Tensor:
        key = f"{name}.{part}"
        return self.weights.read(key).reshape(self.weights.entries[key].shape)

    def _stored(self, name: str, block: int) -> Changes | None:
        if name not in self.ends:
            return None
        ends = self.ends[name]
        start = ends[block - 1].tolist() if block else [0, 0]
        stop = ends[block].tolist()
        if stop[1] == start[1]:
            return None
        gaps = self.weights.read(f"{name}.gaps", start[0], stop[0])
        values = self.weights.read(f"{name}.values", start[1], stop[1])
        positions = decode(gaps.numpy())
        if len(positions) != len(values):
            raise RunError(f"{self.path}: {name} is damaged; make the patch again.")
        return Changes(positions, values)

    def holds(self, name: str, shape: Sequence[int], blocks: int) -> bool:
        """Whether what the file has of a tensor fits one of this shape and so many blocks."""
        if name in self.ends:
            return len(self.ends[name]) == blocks
        parts = [self.weights.entries[f"{name}.{part}"].shape for part in FACTORS]
        (rows, rank), (other_rank, columns) = parts
        return rank == other_rank and matrix_of(shape) == (rows, columns)

    @property
    def names(self) -> list[str]:
        """Tensors that the file changes."""
        return [*self.ends, *self.factors]

    @property
    def count(self) -> int:
        """Values in the file, those of factors included."""
        factors = [f"{name}.{part}" for name in self.factors for part in FACTORS]
        stored = sum(int(ends[-1, 1]) for ends in self.ends.values())
        return stored + sum(self.weights.entries[key].count for key in factors)


class SparseWriter:
    """Writes such a file tensor by tensor; memory holds one tensor's changes.

    The header comes first in the file and is known last: room for it is kept.
    """

    def __init__(self, file: BinaryIO, names: Sequence[str]) -> None:
        self.file = file
        self.header: dict[str, object] = {}
        self.factors: dict[str, Tensor] = {}
        self.checksum = hashlib.sha256()
        self.room = sum(HEADER_BYTES + 3 * len(name.encode()) for name in names)
        self.room += METADATA_BYTES - self.room % ALIGN
        self.start = 8 + self.room
        file.seek(self.start)
        self.count = 0

    def add(self, name: str, blocks: Sequence[Changes | None]) -> None:
        """Add the changes of all blocks of a tensor; nothing is written where there are none."""
        found = [block for block in blocks if block is not None]
        if not any(len(block.positions) for block in found):
            return
        coded = [encode(block.positions) if block else np.empty(0, np.uint8) for block in blocks]
        counts = [len(block.positions) if block else 0 for block in blocks]
        ends = np.stack([np.cumsum([len(c) for c in coded]), np.cumsum(counts)], axis=1)
        self._put(f"{name}.gaps", torch.from_numpy(np.concatenate(coded)))
        self._put(f"{name}.values", torch.cat([block.values for block in found]))
        self._put(f"{name}.ends", torch.from_numpy(ends.astype(np.int64)))
        self.count += sum(counts)

    def add_factors(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add the factors (M, R) and (R, N) of a matrix; they wait in memory for `finish`."""
        for part, factor in zip(FACTORS, (left, right), strict=True):
            self.factors[f"{name}.{part}"] = factor
            self.count += factor.numel()

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what waits, then the header."""
        # Last: a factor is as long as it is, and whole numbers after it would lie askew.
        for key, factor in self.factors.items():
            self._put(key, factor)
        known = dict(metadata)
        content = {"__metadata__": known, **self.header}
        self.checksum.update(_json(content))
        known[CHECKSUM] = self.checksum.hexdigest()
        text = _json(content)
        if len(text) > self.room:
            raise RunError("the patch's header does not fit; give it a shorter name.")
        self.file.seek(0)
        self.file.write(struct.pack("<Q", self.room) + text.ljust(self.room))

    def _put(self, key: str, values: Tensor) -> None:
        start = self.file.tell() - self.start
        flat = values.reshape(-1)
        # Filled up to whole numbers of ALIGN: a hole between two tensors is not allowed.
        missing = -flat.numel() * flat.itemsize % ALIGN // flat.itemsize
        if missing and values.ndim == 1:
            flat = torch.cat([flat, torch.zeros(missing, dtype=flat.dtype)])
        data = flat.view(torch.uint8).numpy().data
        self.file.write(data)
        self.checksum.update(data)
        shape = [flat.numel()] if values.ndim == 1 else list(values.shape)
        stop = self.file.tell() - self.start
        self.header[key] = {
            "dtype": CODES[flat.dtype],
            "shape": shape,
            "data_offsets": [start, stop],
        }


def _json(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
