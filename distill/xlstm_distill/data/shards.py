"""Packed rows on disk: Arrow shards that are written whole and read memory-mapped, and their index."""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from xlstm_distill.artifacts.hashing import crc32
from xlstm_distill.data.packing import PackedRow
from xlstm_distill.errors import RunError

INDEX_FILE = "index.json"
SHARD_TOKENS = 2**24
"""Tokens of a shard: what a killed preparation loses at most, and what a writer holds in memory (5 bytes each)."""
OPEN_SHARDS = 64
SMALL_VOCABULARY = 2**16


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when it is complete and on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@dataclass
class RowShardWriter:
    """Writes rows of `context` tokens in shards; the caller says when one is to end.

    `ids` take 2 bytes a token where the vocabulary allows it, else 4; `supervised` 1 bit; documents 4 bytes each.
    """

    folder: Path
    context: int
    vocabulary: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, int] = field(
        default_factory=lambda: {"tokens": 0, "supervised": 0, "documents": 0}
    )
    _rows: list[PackedRow] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows added, those of finished shards included."""
        return sum(shard["rows"] for shard in self.shards) + len(self._rows)

    @property
    def is_full(self) -> bool:
        """Whether the rows since the last shard make a new one."""
        return len(self._rows) * self.context >= SHARD_TOKENS

    def add(self, row: PackedRow) -> None:
        """Add a row."""
        self._rows.append(row)

    def end_shard(self) -> None:
        """Write the rows since the last shard as a shard of their own."""
        if not self._rows:
            return
        name = f"rows-{len(self.shards):05d}.arrow"
        batch = self._batch()
        with (
            written_whole(self.folder / name) as file,
            pa.ipc.new_stream(file, batch.schema) as stream,
        ):
            stream.write_batch(batch)
        path = self.folder / name
        size, checksum = path.stat().st_size, crc32(path)
        self.shards.append(
            {"file": name, "rows": len(self._rows), "bytes": size, "crc32": checksum}
        )
        for row in self._rows:
            self.totals["tokens"] += row.used
            self.totals["supervised"] += int(row.supervised.sum())
            self.totals["documents"] += len(row.lengths)
        self._rows = []

    def _batch(self) -> pa.RecordBatch:
        ids = np.concatenate([row.ids for row in self._rows])
        ids = ids.astype(np.uint16 if self.vocabulary <= SMALL_VOCABULARY else np.int32, copy=False)
        bits = np.packbits(
            np.concatenate([row.supervised for row in self._rows]), bitorder="little"
        )
        supervised = pa.Array.from_buffers(pa.bool_(), len(ids), [None, pa.py_buffer(bits)])
        columns = {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids), self.context),
            "supervised": pa.FixedSizeListArray.from_arrays(supervised, self.context),
            "lengths": pa.array([row.lengths for row in self._rows], type=pa.list_(pa.int32())),
        }
        return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))

    def close(self) -> None:
        """Write the last shard and the index."""
        self.end_shard()
        index = {"context": self.context, "rows": self.rows, "shards": self.shards}
        with written_whole(self.folder / INDEX_FILE) as file:
            file.write((json.dumps(index, indent=1) + "\n").encode())


def write_rows(folder: Path, rows: Iterable[PackedRow], context: int, vocabulary: int) -> None:
    """Write rows into a folder that `ShardReader` reads."""
    writer = RowShardWriter(folder, context, vocabulary)
    for row in rows:
        writer.add(row)
        if writer.is_full:
            writer.end_shard()
    writer.close()


@dataclass(frozen=True)
class _Shard:
    """Views of a mapped shard: ids (R, T), supervised as bits, documents' lengths as one list with offsets."""

    ids: np.ndarray
    bits: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray

    def row(self, index: int) -> PackedRow:
        context = self.ids.shape[1]
        start = index * context
        bits = np.unpackbits(self.bits[start // 8 : (start + context + 7) // 8], bitorder="little")
        supervised = bits[start % 8 : start % 8 + context].astype(bool)
        lengths = self.lengths[self.offsets[index] : self.offsets[index + 1]].tolist()
        return PackedRow(self.ids[index], supervised, lengths, sum(lengths))


class ShardReader:
    """Reads any row of a folder of shards, memory-mapped; keeps the most recently used shards open.

    A shard's checksum is compared when it is opened for the first time.

    Raises:
        RunError: the index or a shard is missing, cut short or damaged; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX_FILE).read_text())
            self.context: int = index["context"]
            self.shards: list[dict[str, Any]] = index["shards"]
            self._ends = np.cumsum([shard["rows"] for shard in self.shards])
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(folder / INDEX_FILE, error) from error
        for shard in self.shards:
            check_size(folder, shard)
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._sound: set[int] = set()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> PackedRow:
        """Read a row; its arrays must not be written to."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._shard(number).row(
            index - int(self._ends[number]) + self.shards[number]["rows"]
        )

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            if number not in self._sound:
                check_shard(self.folder, self.shards[number])
                self._sound.add(number)
            self._open[number] = self._map(self.folder / self.shards[number]["file"])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _map(self, path: Path) -> _Shard:
        try:
            # Closing gives the file handle back; the arrays keep the mapping.
            with pa.memory_map(str(path)) as source:
                batch = pa.ipc.open_stream(source).read_next_batch()
            ids, supervised, lengths = (
                batch.column("input_ids"),
                batch.column("supervised"),
                batch.column("lengths"),
            )
            return _Shard(
                ids.values.to_numpy().reshape(-1, self.context),
                np.frombuffer(supervised.values.buffers()[1], dtype=np.uint8),
                lengths.values.to_numpy(),
                lengths.offsets.to_numpy(),
            )
        except (OSError, ValueError, KeyError, StopIteration) as error:
            raise _damaged(path, error) from error


def check_shard(folder: Path, shard: Mapping[str, Any]) -> None:
    """Compare a shard with what the index says was written.

    Raises:
        RunError: it is missing, cut short or damaged.
    """
    path = folder / shard["file"]
    check_size(folder, shard)
    if crc32(path) != shard["crc32"]:
        raise _damaged(path, "its checksum is not the one it was written with")


def check_size(folder: Path, shard: Mapping[str, Any]) -> None:
    """Compare a shard's size with what the index says was written; raises as `check_shard` does."""
    path = folder / shard["file"]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _damaged(path, error) from error
    if size != shard["bytes"]:
        raise _damaged(path, f"{size} bytes, {shard['bytes']} were written")


def _damaged(path: Path, reason: object) -> RunError:
    return RunError(
        f"{path}: cannot be read ({reason}); delete {path.parent} and run the command again to make it anew."
    )
