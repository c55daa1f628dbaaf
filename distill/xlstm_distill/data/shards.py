"""Packed rows on disk: Arrow shards and their index (format: docs/data.md)."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from xlstm_distill.artifacts.files import OpenFolder, write_text, written_whole
from xlstm_distill.artifacts.hashing import crc32
from xlstm_distill.data.packing import PackedRow
from xlstm_distill.errors import RunError

INDEX_FILE = "index.json"
SHARD_TOKENS = 2**24
"""Tokens of a shard: what a killed preparation loses at most, and what a writer holds in memory."""
OPEN_SHARDS = 64
SMALL_VOCABULARY = 2**16


@dataclass
class RowShardWriter:
    """Write rows of `context` tokens into shards; the caller decides when a shard ends.

    A token's id takes 2 bytes where the vocabulary allows it, else 4. Whether it is supervised
    takes 1 bit. A document's length takes 4 bytes, and a row's checksum 4.
    """

    folder: Path
    context: int
    vocabulary: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, int] = field(
        default_factory=lambda: {"rows": 0, "tokens": 0, "supervised": 0, "documents": 0}
    )
    _rows: list[PackedRow] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows added, including those of finished shards."""
        # Asked for several times a document, so it must not go through all shards.
        return self.totals["rows"] + len(self._rows)

    @property
    def is_full(self) -> bool:
        """Whether the rows since the last shard fill a new one."""
        return len(self._rows) * self.context >= SHARD_TOKENS

    def add(self, row: PackedRow) -> None:
        """Add a row; it stays in memory until its shard ends."""
        self._rows.append(row)

    def end_shard(self) -> None:
        """Write the rows since the last shard as a new shard."""
        # A domain whose last row ended a shard has no more to write.
        if not self._rows:
            return
        path = self.folder / f"rows-{len(self.shards):05d}.arrow"
        batch = self._batch()
        with written_whole(path) as file, pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
        self.shards.append(
            {
                "file": path.name,
                "rows": len(self._rows),
                "bytes": path.stat().st_size,
                "crc32": crc32(path),
            }
        )
        # Totals count finished shards only: they are saved with the shards for a later process.
        self.totals["rows"] += len(self._rows)
        for row in self._rows:
            self.totals["tokens"] += row.used
            self.totals["supervised"] += int(row.supervised.sum())
            self.totals["documents"] += len(row.lengths)
        self._rows = []

    def _batch(self) -> pa.RecordBatch:
        """Build the Arrow record batch of the rows since the last shard."""
        dtype = np.uint16 if self.vocabulary <= SMALL_VOCABULARY else np.int32
        ids = np.concatenate([row.ids for row in self._rows]).astype(dtype, copy=False)
        flags = np.concatenate([row.supervised for row in self._rows])
        # Arrow booleans are bits, lowest bit first. Rows follow each other without padding.
        bits = pa.py_buffer(np.packbits(flags, bitorder="little"))
        supervised = pa.Array.from_buffers(pa.bool_(), len(flags), [None, bits])
        lengths = [row.lengths for row in self._rows]
        stored = ids.reshape(-1, self.context)
        checksums = [
            _checksum(own, row.supervised, np.array(row.lengths, dtype=np.int32))
            for own, row in zip(stored, self._rows, strict=True)
        ]
        columns = {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids), self.context),
            "supervised": pa.FixedSizeListArray.from_arrays(supervised, self.context),
            "lengths": pa.array(lengths, type=pa.list_(pa.int32())),
            "checksum": pa.array(checksums, type=pa.uint32()),
        }
        return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))

    def close(self) -> None:
        """Write the last shard and the index."""
        self.end_shard()
        index = {"context": self.context, "rows": self.rows, "shards": self.shards}
        write_text(self.folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")


def write_rows(folder: Path, rows: Iterable[PackedRow], context: int, vocabulary: int) -> None:
    """Write rows into a folder that `ShardReader` reads."""
    writer = RowShardWriter(folder, context, vocabulary)
    for row in rows:
        writer.add(row)
        if writer.is_full:
            writer.end_shard()
    writer.close()


@dataclass(frozen=True)
class _MappedShard:
    """Memory-mapped arrays of a shard.

    ids (R, T); bits (R * T / 8,) uint8, one bit a token: supervised or not; lengths of all
    documents, those of row r at offsets[r] to offsets[r + 1]; checksums (R,) of the rows.
    """

    ids: np.ndarray
    bits: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    checksums: np.ndarray

    def row(self, index: int) -> PackedRow | None:
        """Read the row at this place of the shard; None if its bytes are not those written."""
        context = self.ids.shape[1]
        # A row can start and end inside a byte, because its bits follow those of the row before.
        first_byte, skipped = divmod(index * context, 8)
        bytes_read = -(-(skipped + context) // 8)
        bits = np.unpackbits(self.bits[first_byte : first_byte + bytes_read], bitorder="little")
        supervised = bits[skipped : skipped + context].astype(bool)
        documents = slice(self.offsets[index], self.offsets[index + 1])
        lengths = self.lengths[documents]
        if _checksum(self.ids[index], supervised, lengths) != self.checksums[index]:
            return None
        of_documents = lengths.tolist()
        return PackedRow(self.ids[index], supervised, of_documents, used=sum(of_documents))


class ShardReader:
    """Read any row of a folder of shards, memory-mapped; the `most_open` last used stay mapped.

    Each row is compared with its own checksum when it is read: reading whole shards for theirs
    would take minutes before the first step, since training reads rows in random order.

    Raises:
        RunError: the index, a shard or a row is missing, cut short or damaged; the message names
            the file.
    """

    def __init__(self, folder: Path, most_open: int = OPEN_SHARDS) -> None:
        self.folder, self.most_open = folder, most_open
        try:
            # From here on by this folder, not by its name: see `OpenFolder`.
            self._open = OpenFolder(folder)
            with self._open.open(INDEX_FILE) as file:
                index = json.load(file)
            self.context: int = index["context"]
            self.shards: list[dict[str, Any]] = index["shards"]
            self._ends = np.cumsum([shard["rows"] for shard in self.shards])
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(folder / INDEX_FILE, error) from error
        # Sizes cost nothing to compare; checksums wait until a row is read.
        for shard in self.shards:
            _compare_size(folder / shard["file"], self._size(shard["file"]), shard)
        self.mapped: OrderedDict[int, _MappedShard] = OrderedDict()
        # A training reads ahead in one thread while another validates.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> PackedRow:
        """Read a row; its arrays must not be written to."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number]) - self.shards[number]["rows"]
        with self._lock:
            shard = self._shard(number)
        row = shard.row(index - first)
        if row is None:
            path = self.folder / self.shards[number]["file"]
            raise _damaged(path, f"row {index} has not the checksum it was written with")
        return row

    def _shard(self, number: int) -> _MappedShard:
        """Return a shard, mapped."""
        if number not in self.mapped:
            self.mapped[number] = self._map(self.shards[number])
            if len(self.mapped) > self.most_open:
                self.mapped.popitem(last=False)
        self.mapped.move_to_end(number)
        return self.mapped[number]

    def _size(self, name: str) -> int:
        try:
            return os.stat(name, dir_fd=self._open.descriptor).st_size
        except OSError as error:
            raise _damaged(self.folder / name, error) from error

    def _map(self, entry: Mapping[str, Any]) -> _MappedShard:
        path = self.folder / entry["file"]
        try:
            with self._open.open(entry["file"]) as file:
                _compare_size(path, os.fstat(file.fileno()).st_size, entry)
                # Closing gives the file handles back; the arrays keep the mapping. Arrow takes
                # names only, and this one is that of the open file.
                with pa.memory_map(f"/dev/fd/{file.fileno()}") as source:
                    batch = pa.ipc.open_stream(source).read_next_batch()
            ids = batch.column("input_ids").values.to_numpy()
            bits = batch.column("supervised").values.buffers()[1]
            lengths = batch.column("lengths")
            return _MappedShard(
                ids=ids.reshape(-1, self.context),
                bits=np.frombuffer(bits, dtype=np.uint8),
                lengths=lengths.values.to_numpy(),
                offsets=lengths.offsets.to_numpy(),
                checksums=batch.column("checksum").to_numpy(),
            )
        except (OSError, ValueError, KeyError, StopIteration) as error:
            raise _damaged(path, error) from error


def _checksum(ids: np.ndarray, supervised: np.ndarray, lengths: np.ndarray) -> int:
    """Checksum of a row: its ids as they are stored (T,), supervised (T,), lengths of documents."""
    value = zlib.crc32(np.ascontiguousarray(ids).data)
    value = zlib.crc32(np.ascontiguousarray(supervised).data, value)
    return zlib.crc32(np.ascontiguousarray(lengths).data, value)


def check_shard(folder: Path, shard: Mapping[str, Any]) -> None:
    """Compare a shard's size and checksum with its entry in the index.

    Raises:
        RunError: it is missing, cut short or damaged.
    """
    check_size(folder, shard)
    path = folder / shard["file"]
    if crc32(path) != shard["crc32"]:
        raise _damaged(path, "its checksum is not the one it was written with")


def check_size(folder: Path, shard: Mapping[str, Any]) -> None:
    """Compare a shard's size with its entry in the index; raises like `check_shard`."""
    path = folder / shard["file"]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _damaged(path, error) from error
    _compare_size(path, size, shard)


def _compare_size(path: Path, size: int, shard: Mapping[str, Any]) -> None:
    if size != shard["bytes"]:
        raise _damaged(path, f"it has {size} bytes; {shard['bytes']} were written")


def _damaged(path: Path, reason: object) -> RunError:
    return RunError(
        f"{path}: cannot be read ({reason}); delete {path.parent} and run the command again to "
        "make it anew."
    )
