"""Files of coded targets: memory-mapped shards that say what they were made from and check what they hold.

docs/targets.md has the format. Reading needs nothing but these files: no pickle, no code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xlstm_distill.errors import RunError
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.targets.codec import TargetRow, arrange, decode, encode, kl_error

MAGIC = b"XLSTMTGT"
VERSION = 1
PREFIX = struct.Struct("<8sIII")
"""A shard's first bytes: magic, version, length and CRC-32 of the JSON text that follows."""
HEADER_BYTES = 4096
ROW = np.dtype(
    [("offset", "<u8"), ("bytes", "<u4"), ("tokens", "<u4"), ("checksum", "<u4"), ("source", "<u4")]
)
"""An entry of the index at a shard's end; `checksum` is of the row's bytes, `source` of the text it belongs to."""
INDEX_FILE = "index.json"
OPEN_SHARDS = 64
"""Shards kept open at most: each holds a file descriptor."""


@dataclass(frozen=True)
class Identity:
    """What the targets of a domain were made from: hashes of rows, tokenizer and teacher, and how much was kept."""

    domain: str
    data: str
    tokenizer: str
    teacher: str
    revision: str | None
    dtype: str
    top_k: int
    mass: float | None
    min_k: int

    def difference(self, other: Identity) -> str | None:
        """Name the first field in which the other is different."""
        for part in dataclasses.fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if mine != theirs:
                return f"{part.name} is {mine!r}, here it is {theirs!r}"
        return None


@dataclass
class Figures:
    """Sums over the tokens of a shard or of a store; both errors in nats (docs/targets.md)."""

    tokens: int = 0
    kept: int = 0
    bytes: int = 0
    kl_error: float = 0.0
    cut: float = 0.0

    def add(self, other: Figures) -> None:
        """Add another's sums."""
        for part in dataclasses.fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))

    def means(self) -> dict[str, float]:
        """The store's figures per token."""
        tokens = max(self.tokens, 1)
        return {
            "tokens": self.tokens,
            "mean_k": self.kept / tokens,
            "bytes_per_token": self.bytes / tokens,
            "mean_kl_error": self.kl_error / tokens,
            "mean_cut": self.cut / tokens,
        }


@dataclass(frozen=True)
class Header:
    """A shard's header: identity, place in the domain, where its index lies, and the figures of its tokens."""

    identity: Identity
    vocabulary: int
    shard: int
    first_row: int
    rows: int
    index_offset: int
    index_checksum: int
    figures: Figures = field(default_factory=Figures)

    def to_bytes(self) -> bytes:
        """The header's page."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        page = PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text
        if len(page) > HEADER_BYTES:
            raise RunError(
                f"a shard's header takes {len(page)} bytes of {HEADER_BYTES}; shorten the domain's name."
            )
        return page.ljust(HEADER_BYTES, b"\0")

    @property
    def checksum(self) -> int:
        """Checksum of the header; through the index's, which has the rows', of the whole shard."""
        return zlib.crc32(self.to_bytes())


def refusal(path: Path, why: str) -> RunError:
    """The error for a file that cannot be used; a shard lies in ARTIFACT/store/."""
    return RunError(f"{path}: {why}. Delete {path.parent.parent} and run capture again.")


def read_header(path: Path) -> Header:
    """Read and check a shard's header, and that the file is as long as it says.

    Raises:
        RunError: the file is missing, cut short, damaged, or of another version.
    """
    try:
        with path.open("rb") as file:
            page = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror})") from error
    if len(page) < HEADER_BYTES:
        raise refusal(path, f"cut short: {len(page)} bytes, a header alone has {HEADER_BYTES}")
    magic, version, length, checksum = PREFIX.unpack_from(page)
    if magic != MAGIC:
        raise refusal(path, "not a shard of targets")
    if version != VERSION:
        raise refusal(path, f"has format version {version}, this program reads version {VERSION}")
    text = page[PREFIX.size : PREFIX.size + length]
    if zlib.crc32(text) != checksum:
        raise refusal(path, "its header is damaged (wrong checksum)")
    content = json.loads(text)
    content["identity"], content["figures"] = (
        Identity(**content["identity"]),
        Figures(**content["figures"]),
    )
    header = Header(**content)
    expected = header.index_offset + header.rows * ROW.itemsize
    if size != expected:
        raise refusal(path, f"cut short or overlong: {size} bytes, it was written with {expected}")
    return header


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"targets-{number:05d}.bin"


class TargetShardWriter:
    """Writes a shard beside its place; `write_shard` moves it there when it is complete."""

    def __init__(
        self, file: BinaryIO, identity: Identity, vocabulary: int, number: int, first_row: int
    ) -> None:
        self.file, self.identity, self.vocabulary = file, identity, vocabulary
        self.number, self.first_row = number, first_row
        self.index: list[tuple[int, int, int, int, int]] = []
        self.offset = HEADER_BYTES
        self.figures = Figures()
        file.write(bytes(HEADER_BYTES))

    def add(self, counts: Sequence[int], sources: Sequence[int], targets: SparseTargets) -> None:
        """Append rows: kept tokens and checksum of the text of each, and the top k of all their tokens in order.

        What mass and min_k leave of them is coded, and decoded again to measure the error.
        """
        kept = targets.keep_mass(self.identity.mass, self.identity.min_k)
        cut = (
            targets.log_probs.double().exp().sum(-1).log()
            - kept.log_probs.double().exp().sum(-1).log()
        )
        self.figures.cut += float(cut.sum())
        ids, log_probs, tail = (
            part.cpu().numpy() for part in (kept.ids, kept.log_probs, kept.tail)
        )
        lengths = np.isfinite(log_probs).sum(axis=1)
        stop = 0
        for count, source in zip(counts, sources, strict=True):
            own = slice(stop, stop := stop + count)
            if count and int(lengths[own].min()) == 0:
                row = self.first_row + len(self.index)
                raise RunError(
                    f"capture/{self.identity.domain}: the teacher's logits of row {row} are not finite."
                )
            self._add_row(arrange(lengths[own], ids[own], log_probs[own], tail[own]), source)

    def _add_row(self, row: TargetRow, source: int) -> None:
        data = encode(row, self.vocabulary)
        tokens = len(row.counts)
        self.figures.tokens += tokens
        self.figures.kept += len(row.ids)
        self.figures.kl_error += float(kl_error(row, decode(data, tokens, self.vocabulary)).sum())
        self.index.append((self.offset, len(data), tokens, zlib.crc32(data), source))
        self.file.write(data)
        self.offset += len(data)

    def finish(self) -> None:
        """Write the index and, last, the header."""
        index = np.array(self.index, ROW).tobytes()
        self.file.write(index)
        self.figures.bytes = self.offset + len(index)
        header = Header(
            self.identity, self.vocabulary, self.number, self.first_row, len(self.index), self.offset,
            zlib.crc32(index), self.figures,
        )  # fmt: skip
        self.file.seek(0)
        self.file.write(header.to_bytes())


@contextlib.contextmanager
def write_shard(
    directory: Path, identity: Identity, vocabulary: int, number: int, first_row: int
) -> Iterator[TargetShardWriter]:
    """Give a writer in the block; the shard appears under its name, on disk, when the block ends without an error."""
    path = directory / shard_name(number)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with partial.open("wb") as file:
            writer = TargetShardWriter(file, identity, vocabulary, number, first_row)
            yield writer
            writer.finish()
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_index(directory: Path, identity: Identity) -> Figures:
    """Write the store's index over all its shards and remove what killed writers left; returns the figures."""
    for partial in directory.glob(".*.partial"):
        partial.unlink(missing_ok=True)
    headers = [read_header(path) for path in sorted(directory.glob("targets-*.bin"))]
    figures = Figures()
    for header in headers:
        figures.add(header.figures)
    shards = [
        {
            "file": shard_name(h.shard),
            "first_row": h.first_row,
            "rows": h.rows,
            "checksum": h.checksum,
        }
        for h in headers
    ]
    index = {
        "version": VERSION, "identity": dataclasses.asdict(identity), "shards": shards, "figures": figures.means(),
    }  # fmt: skip
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
    return figures


class Shard:
    """A shard, memory-mapped."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.bytes = np.memmap(path, np.uint8, "r")
        index = self.bytes[header.index_offset :].tobytes()
        if zlib.crc32(index) != header.index_checksum:
            raise refusal(path, "its index is damaged (wrong checksum)")
        self.index = np.frombuffer(index, ROW)

    def row(self, row: int) -> tuple[TargetRow, int]:
        """Decode a row of the domain; also returns the checksum of the text it was made from.

        Raises:
            RunError: its bytes are not those that were written.
        """
        entry = self.index[row - self.header.first_row]
        start = int(entry["offset"])
        data = self.bytes[start : start + int(entry["bytes"])].data
        if zlib.crc32(data) != int(entry["checksum"]):
            raise refusal(self.path, f"row {row} is damaged (wrong checksum)")
        try:
            return decode(data, int(entry["tokens"]), self.header.vocabulary), int(entry["source"])
        except ValueError as error:
            raise refusal(self.path, f"row {row}: {error}") from error


class Store:
    """The targets of one domain.

    Raises:
        RunError: it was made from something else than `expected`, or a shard is missing, damaged, cut short, of another
            version or of another store.
    """

    def __init__(self, directory: Path, expected: Identity) -> None:
        self.directory = directory
        index = self._read_index()
        if difference := Identity(**index["identity"]).difference(expected):
            raise refusal(directory / INDEX_FILE, f"belongs to another run: its {difference}")
        self.headers = [self._check(entry, expected) for entry in index["shards"]]
        self.first_rows = np.array([header.first_row for header in self.headers])
        self.rows = sum(header.rows for header in self.headers)
        self.open: OrderedDict[int, Shard] = OrderedDict()

    def _read_index(self) -> dict[str, Any]:
        path = self.directory / INDEX_FILE
        try:
            index = json.loads(path.read_text())
            version = index["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise refusal(path, f"cannot be read ({error})") from error
        if version != VERSION:
            raise refusal(
                path, f"has format version {version}, this program reads version {VERSION}"
            )
        return index

    def _check(self, entry: dict[str, Any], expected: Identity) -> Header:
        path = self.directory / entry["file"]
        header = read_header(path)
        if difference := header.identity.difference(expected):
            raise refusal(path, f"belongs to another run: its {difference}")
        if header.checksum != entry["checksum"]:
            raise refusal(path, f"is not the shard that {INDEX_FILE} was written for")
        return header

    def row(self, row: int) -> tuple[TargetRow, int]:
        """Decode a row; also returns the checksum of the text it was made from."""
        if not 0 <= row < self.rows:
            raise refusal(
                self.directory / INDEX_FILE, f"has {self.rows} rows, row {row} was asked for"
            )
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        if number not in self.open:
            if len(self.open) >= OPEN_SHARDS:
                self.open.popitem(last=False)
            header = self.headers[number]
            self.open[number] = Shard(self.directory / shard_name(header.shard), header)
        self.open.move_to_end(number)
        return self.open[number].row(row)
