"""The targets of a domain: shards, and an index that names them and their checksums."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xlstm_distill.artifacts.files import OpenFolder, remove_partials, write_text
from xlstm_distill.targets.codec import TargetRow
from xlstm_distill.targets.shard import (
    VERSION,
    Figures,
    Header,
    Identity,
    TargetShard,
    header_of,
    other_version,
    read_header,
    refusal,
    shard_name,
)

INDEX_FILE = "index.json"
OPEN_SHARDS = 64
"""Shards kept open at most: each holds a file descriptor."""


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
            raise other_version(path, version)
        return index

    def _check(self, entry: dict[str, Any], expected: Identity) -> Header:
        path = self.directory / entry["file"]
        # Also the identity of each shard: another run may have left one of the same name here.
        with self._open(path) as file:
            header = header_of(path, file)
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
                found = header_of(path, file)
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
