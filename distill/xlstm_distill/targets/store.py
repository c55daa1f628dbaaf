"""Files of coded targets: memory-mapped shards that say what they were made from.

docs/targets.md has the format. Reading needs nothing but these files: no pickle, no code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import struct
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xlstm_distill.artifacts.files import OpenFolder, remove_partials, write_text, written_whole
from xlstm_distill.errors import RunError
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.targets.codec import TargetRow, decode
from xlstm_distill.targets.coding import HERE, CodedRow, Coder, KeptRow
from xlstm_distill.targets.transfer import HostTargets, to_host

MAGIC = b"XLSTMTGT"
VERSION = 1
PREFIX = struct.Struct("<8sIII")
"""A shard's first bytes: magic, version, length and CRC-32 of the JSON text that follows."""
# A page, fixed in size: the header is written last, in place, when the rows lie behind it.
HEADER_BYTES = 4096
ROW = np.dtype(
    # Little-endian and without gaps: the dtype is the file's format, whatever the machine.
    [("offset", "<u8"), ("bytes", "<u4"), ("tokens", "<u4"), ("checksum", "<u4"), ("source", "<u4")]
)
"""An entry of the index at a shard's end.

`checksum` is that of the row's bytes, `source` that of the text that the row belongs to.
"""
INDEX_FILE = "index.json"
MEASURED_ROWS = 16
"""The KL error of the coding is measured on every row whose number is a multiple of this.

By number, so that it is the same rows whoever writes them.
"""
OPEN_SHARDS = 64
"""Shards kept open at most: each holds a file descriptor."""


@dataclass(frozen=True)
class Identity:
    """What the targets of a domain were made from.

    data, tokenizer and teacher are hashes. top_k, mass and min_k say how many ids are kept.
    """

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
        """Name the first field in which the other is different; None if there is none."""
        for part in dataclasses.fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if mine != theirs:
                return f"{part.name} is {mine!r}, here it is {theirs!r}"
        return None


@dataclass
class Figures:
    """Sums over the tokens of a shard or of a store; both errors in nats (docs/targets.md).

    `kl_error` is a sum over the `measured` tokens, the others over all `tokens`.
    """

    tokens: int = 0
    measured: int = 0
    kept: int = 0
    bytes: int = 0
    kl_error: float = 0.0
    cut: float = 0.0

    def add(self, other: Figures) -> None:
        """Add another's sums."""
        for part in dataclasses.fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))

    def means(self) -> dict[str, float]:
        """Return the figures per token."""
        tokens = max(self.tokens, 1)
        return {
            "tokens": self.tokens,
            "mean_k": self.kept / tokens,
            "bytes_per_token": self.bytes / tokens,
            "mean_kl_error": self.kl_error / max(self.measured, 1),
            "kl_error_tokens": self.measured,
            "mean_cut": self.cut / tokens,
        }


@dataclass(frozen=True)
class Header:
    """A shard's header: identity, place in the domain, place of its index, and figures."""

    identity: Identity
    vocabulary: int
    shard: int
    first_row: int
    rows: int
    index_offset: int
    index_checksum: int
    figures: Figures = field(default_factory=Figures)

    def to_bytes(self) -> bytes:
        """Return the header's page."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        page = PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text
        if len(page) > HEADER_BYTES:
            raise RunError(
                f"a shard's header takes {len(page)} bytes of {HEADER_BYTES}; shorten the "
                "domain's name."
            )
        return page.ljust(HEADER_BYTES, b"\0")

    @property
    def checksum(self) -> int:
        """Checksum of the header.

        It covers the whole shard: the header holds the index's checksum, the index those of rows.
        """
        return zlib.crc32(self.to_bytes())


def refusal(path: Path, why: str) -> RunError:
    """Make the error for a file that cannot be used; a shard lies in ARTIFACT/store/."""
    return RunError(f"{path}: {why}. Delete {path.parent.parent} and run capture again.")


def _other_version(path: Path, version: Any) -> RunError:
    return refusal(path, f"has format version {version}, this program reads version {VERSION}")


def read_header(path: Path) -> Header:
    """Read and check a shard's header, and compare the file's length with it.

    Raises:
        RunError: the file is missing, cut short, damaged, or of another version.
    """
    try:
        with path.open("rb") as file:
            return _header_of(path, file)
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror})") from error


def _header_of(path: Path, file: BinaryIO) -> Header:
    """Read and check the header of a shard that is open; `path` is for messages."""
    page = file.read(HEADER_BYTES)
    size = os.fstat(file.fileno()).st_size
    if len(page) < HEADER_BYTES:
        raise refusal(path, f"cut short: {len(page)} bytes, a header alone has {HEADER_BYTES}")
    magic, version, length, checksum = PREFIX.unpack_from(page)
    if magic != MAGIC:
        raise refusal(path, "not a shard of targets")
    if version != VERSION:
        raise _other_version(path, version)
    text = page[PREFIX.size : PREFIX.size + length]
    if zlib.crc32(text) != checksum:
        raise refusal(path, "its header is damaged (wrong checksum)")
    content = json.loads(text)
    content["identity"] = Identity(**content["identity"])
    content["figures"] = Figures(**content["figures"])
    header = Header(**content)
    # A copy that broke off has a whole header, since that comes first.
    expected = header.index_offset + header.rows * ROW.itemsize
    if size != expected:
        raise refusal(path, f"cut short or overlong: {size} bytes, it was written with {expected}")
    return header


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"targets-{number:05d}.bin"


class TargetShardWriter:
    """Write a shard's rows into an open file; `write_shard` makes one.

    Rows are coded by `coder` and written in their order, so the bytes do not depend on it.
    """

    def __init__(
        self,
        file: BinaryIO,
        identity: Identity,
        vocabulary: int,
        number: int,
        first_row: int,
        coder: Coder = HERE,
    ) -> None:
        self.file, self.identity, self.vocabulary = file, identity, vocabulary
        self.number, self.first_row = number, first_row
        self.coder = coder
        # Rows under way, in order: coded or being coded, checksum of their text, sum of their cut.
        self.under_way: deque[tuple[Future[CodedRow], int, float]] = deque()
        self.index: list[tuple[int, int, int, int, int]] = []
        self.offset = HEADER_BYTES
        self.figures = Figures()
        # The header is known last. Until it is written, the file is no shard of targets.
        file.write(bytes(HEADER_BYTES))

    def add(self, counts: Sequence[int], sources: Sequence[int], targets: SparseTargets) -> None:
        """Append rows.

        For each row, `counts` holds its kept tokens and `sources` the checksum of its text.
        `targets` holds the top k of all their tokens in order, to be cut to the identity's mass.

        Raises:
            RunError: the teacher's logits were not finite.
        """
        self.put(counts, sources, to_host(targets, self.identity.mass, self.identity.min_k))

    def put(self, counts: Sequence[int], sources: Sequence[int], targets: HostTargets) -> None:
        """Append rows as `add` does, of targets that are cut already and perhaps still copied."""
        ids, log_probs, lengths, tail, cut = targets.wait()
        place = np.arange(ids.shape[1])
        start = 0
        for count, source in zip(counts, sources, strict=True):
            own = slice(start, start + count)
            start += count
            number = self.first_row + len(self.index) + len(self.under_way)
            # A token always keeps an id, unless no log-probability of it is finite.
            if count and int(lengths[own].min()) == 0:
                raise RunError(
                    f"capture/{self.identity.domain}: the teacher's logits of row {number} are "
                    "not finite."
                )
            # Flat from here on: what is padding here would be most of what a worker is sent.
            kept = place < lengths[own, None]
            row = KeptRow(
                counts=lengths[own],
                ids=ids[own][kept],
                log_probs=log_probs[own][kept],
                tail=tail[own],
                vocabulary=self.vocabulary,
                measured=number % MEASURED_ROWS == 0,
            )
            self.under_way.append((self.coder.submit(row), source, float(cut[own].sum())))
            self._write(self.coder.ahead)

    def _write(self, most: int) -> None:
        """Write the oldest rows until no more than `most` are under way; waits for them."""
        while len(self.under_way) > most:
            future, source, cut = self.under_way.popleft()
            row = future.result()
            self.figures.tokens += row.tokens
            self.figures.kept += row.kept
            self.figures.cut += cut
            if row.kl_error is not None:
                self.figures.measured += row.tokens
                self.figures.kl_error += row.kl_error
            checksum = zlib.crc32(row.data)
            self.index.append((self.offset, len(row.data), row.tokens, checksum, source))
            self.file.write(row.data)
            self.offset += len(row.data)

    def finish(self) -> None:
        """Write the rows that are still under way, the index and, last, the header."""
        self._write(0)
        index = np.array(self.index, ROW).tobytes()
        self.file.write(index)
        self.figures.bytes = self.offset + len(index)
        header = Header(
            identity=self.identity,
            vocabulary=self.vocabulary,
            shard=self.number,
            first_row=self.first_row,
            rows=len(self.index),
            index_offset=self.offset,
            index_checksum=zlib.crc32(index),
            figures=self.figures,
        )
        # Last, because it holds the index's checksum and the figures.
        self.file.seek(0)
        self.file.write(header.to_bytes())


@contextlib.contextmanager
def write_shard(
    directory: Path,
    identity: Identity,
    vocabulary: int,
    number: int,
    first_row: int,
    coder: Coder = HERE,
) -> Iterator[TargetShardWriter]:
    """Give a writer; the shard appears under its name when the block ends without an error."""
    with written_whole(directory / shard_name(number)) as file:
        writer = TargetShardWriter(file, identity, vocabulary, number, first_row, coder)
        yield writer
        writer.finish()


def write_index(directory: Path, identity: Identity) -> Figures:
    """Write the store's index over all its shards; return their figures.

    No process may be writing shards. What killed writers left is removed.
    """
    remove_partials(directory)
    figures = Figures()
    shards = []
    for path in sorted(directory.glob("targets-*.bin")):
        header = read_header(path)
        figures.add(header.figures)
        shards.append(
            {
                "file": shard_name(header.shard),
                "first_row": header.first_row,
                "rows": header.rows,
                "checksum": header.checksum,
            }
        )
    index = {
        "version": VERSION,
        "identity": dataclasses.asdict(identity),
        "shards": shards,
        "figures": figures.means(),
    }
    write_text(directory / INDEX_FILE, json.dumps(index, indent=1) + "\n")
    return figures


def shard_checks(directory: Path) -> dict[str, Callable[[], None]]:
    """By file, a function that reads a shard of a store and compares all its checksums.

    It raises RunError where the shard is missing, cut short or damaged.
    """
    index = json.loads((directory / INDEX_FILE).read_text())
    checks: dict[str, Callable[[], None]] = {}
    for entry in index["shards"]:
        path = directory / entry["file"]
        checks[entry["file"]] = functools.partial(_check_shard, path, entry["checksum"])
    return checks


def _check_shard(path: Path, checksum: int) -> None:
    header = read_header(path)
    if header.checksum != checksum:
        raise refusal(path, "it is another shard than the index names (wrong checksum)")
    shard = TargetShard(path, header)
    for number, entry in enumerate(shard.index):
        start = int(entry["offset"])
        row = shard.bytes[start : start + int(entry["bytes"])].data
        if zlib.crc32(row) != int(entry["checksum"]):
            raise refusal(path, f"row {header.first_row + number} is damaged (wrong checksum)")


class TargetShard:
    """A shard, memory-mapped; `file` is the shard where it is open already."""

    def __init__(self, path: Path, header: Header, file: BinaryIO | None = None) -> None:
        self.path, self.header = path, header
        # Mapped: a training reads rows in random order, and a store may be larger than memory.
        self.bytes = np.memmap(path if file is None else file, np.uint8, "r")
        index = self.bytes[header.index_offset :].tobytes()
        if zlib.crc32(index) != header.index_checksum:
            raise refusal(path, "its index is damaged (wrong checksum)")
        self.index = np.frombuffer(index, ROW)

    def row(self, row: int) -> tuple[TargetRow, int]:
        """Decode a row of the domain; also return the checksum of the text it was made from.

        Raises:
            RunError: its bytes are not those that were written.
        """
        entry = self.index[row - self.header.first_row]
        start = int(entry["offset"])
        data = self.bytes[start : start + int(entry["bytes"])].data
        if zlib.crc32(data) != int(entry["checksum"]):
            raise refusal(self.path, f"row {row} is damaged (wrong checksum)")
        # The checksum was right, so this is a shard that somebody put together by hand.
        try:
            return decode(data, int(entry["tokens"]), self.header.vocabulary), int(entry["source"])
        except ValueError as error:
            raise refusal(self.path, f"row {row}: {error}") from error


class Store:
    """The targets of one domain; the `most_open` shards last used stay open.

    Raises:
        RunError: it was made from something else than `expected`, or a shard is missing, damaged,
            cut short, of another version or of another store.
    """

    def __init__(self, directory: Path, expected: Identity, most_open: int = OPEN_SHARDS) -> None:
        self.directory, self.most_open = directory, most_open
        index = self._read_index()
        if difference := Identity(**index["identity"]).difference(expected):
            raise refusal(directory / INDEX_FILE, f"belongs to another run: its {difference}")
        self.headers = [self._check(entry, expected) for entry in index["shards"]]
        self.first_rows = np.array([header.first_row for header in self.headers])
        self.rows = sum(header.rows for header in self.headers)
        self.open: OrderedDict[int, TargetShard] = OrderedDict()
        # A training reads ahead in one thread while another validates.
        self._lock = threading.Lock()

    def _read_index(self) -> dict[str, Any]:
        path = self.directory / INDEX_FILE
        try:
            # From here on by this folder, not by its name: see `OpenFolder`.
            self._folder = OpenFolder(self.directory)
            with self._folder.open(INDEX_FILE) as file:
                index = json.load(file)
            version = index["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise refusal(path, f"cannot be read ({error})") from error
        if version != VERSION:
            raise _other_version(path, version)
        return index

    def _check(self, entry: dict[str, Any], expected: Identity) -> Header:
        path = self.directory / entry["file"]
        # Also the identity of each shard: another run may have left one of the same name here.
        with self._open(path) as file:
            header = _header_of(path, file)
        if difference := header.identity.difference(expected):
            raise refusal(path, f"belongs to another run: its {difference}")
        if header.checksum != entry["checksum"]:
            raise refusal(path, f"is not the shard that {INDEX_FILE} was written for")
        return header

    def row(self, row: int) -> tuple[TargetRow, int]:
        """Decode a row; also return the checksum of the text it was made from."""
        if not 0 <= row < self.rows:
            raise refusal(
                self.directory / INDEX_FILE, f"has {self.rows} rows, row {row} was asked for"
            )
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        with self._lock:
            shard = self._shard(number)
        # Outside of the lock: decoding takes a thousand times as long. A shard that is closed
        # meanwhile stays mapped for as long as it is used.
        return shard.row(row)

    def _shard(self, number: int) -> TargetShard:
        """Return a shard, opened; close the one that was used longest ago if too many are open."""
        if number not in self.open:
            if len(self.open) >= self.most_open:
                self.open.popitem(last=False)
            header = self.headers[number]
            path = self.directory / shard_name(header.shard)
            with self._open(path) as file:
                found = _header_of(path, file)
                if found != header:
                    raise refusal(path, "another shard took its place while this process ran")
                self.open[number] = TargetShard(path, header, file)
        self.open.move_to_end(number)
        return self.open[number]

    def _open(self, path: Path) -> BinaryIO:
        try:
            return self._folder.open(path.name)
        except OSError as error:
            raise refusal(path, f"cannot be read ({error.strerror})") from error
