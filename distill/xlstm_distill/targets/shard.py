"""A shard of coded targets: a memory-mapped file that says what it was made from.

docs/targets.md has the format. Reading needs nothing but these files: no pickle, no code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xlstm_distill.errors import RunError
from xlstm_distill.targets.codec import TargetRow, decode

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

    `kl_error` is a sum over the `measured` tokens of `measured_rows` rows, the others over all
    `tokens`.
    """

    tokens: int = 0
    measured: int = 0
    kept: int = 0
    bytes: int = 0
    kl_error: float = 0.0
    measured_rows: int = 0
    cut: float = 0.0

    def add(self, other: Figures) -> None:
        """Add another's sums."""
        for part in dataclasses.fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))

    def means(self) -> dict[str, float]:
        """Return the figures per token; without `mean_kl_error` where nothing was measured."""
        tokens = max(self.tokens, 1)
        return {
            "tokens": self.tokens,
            "mean_k": self.kept / tokens,
            "bytes_per_token": self.bytes / tokens,
            **({"mean_kl_error": self.kl_error / self.measured} if self.measured else {}),
            "kl_error_tokens": self.measured,
            "kl_error_rows": self.measured_rows,
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


def other_version(path: Path, version: Any) -> RunError:
    return refusal(path, f"has format version {version}, this program reads version {VERSION}")


def read_header(path: Path) -> Header:
    """Read and check a shard's header, and compare the file's length with it.

    Raises:
        RunError: the file is missing, cut short, damaged, or of another version.
    """
    try:
        with path.open("rb") as file:
            return header_of(path, file)
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror})") from error


def header_of(path: Path, file: BinaryIO) -> Header:
    """Read and check the header of a shard that is open; `path` is for messages."""
    page = file.read(HEADER_BYTES)
    size = os.fstat(file.fileno()).st_size
    if len(page) < HEADER_BYTES:
        raise refusal(path, f"cut short: {len(page)} bytes, a header alone has {HEADER_BYTES}")
    magic, version, length, checksum = PREFIX.unpack_from(page)
    if magic != MAGIC:
        raise refusal(path, "not a shard of targets")
    if version != VERSION:
        raise other_version(path, version)
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
