"""Hashes of values, files and folders, and checksums that tell damage."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts.files import write_text

HASH_THREADS = 8
BLOCK = 2**22
CRC_BLOCK = 2**24
REMEMBERED_BYTES = 2**20
"""Size from which a file's hash is remembered on the disk; smaller ones are hashed in no time."""
SETTLED_SECONDS = 2.0
"""Age of a change from which a file's times tell it from the next one."""


def digest(value: Any) -> str:
    """Hash a JSON value, independent of the order of its keys."""
    # Keys, separators and NaN are fixed: the text must be the same on every machine and for ever.
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes; `advance` is called with the number of bytes of each block."""
    total = hashlib.sha256()
    # Streamed: a file of weights may be larger than memory.
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK):
            total.update(block)
            if advance is not None:
                advance(len(block))
    return total.hexdigest()


def sha256_of_all(
    paths: Iterable[Path], advance: Callable[[int], None] | None = None
) -> dict[Path, str]:
    """SHA-256 of files, several at a time."""
    listed = list(paths)
    # Threads are enough: hashlib gives up the interpreter lock for large blocks.
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(listed, pool.map(lambda path: sha256(path, advance), listed), strict=True))


def hash_path(path: Path) -> str:
    """Hash a file or a folder: names, sizes and content of all files, wherever they lie."""
    if path.is_file():
        return hash_files(path.parent, [path])
    return hash_files(path, sorted(p for p in path.rglob("*") if p.is_file()))


def hash_if_there(path: Path) -> str | None:
    """Hash a file or folder, or take rank 0's hash of it (`take_hashes`); None if there is none."""
    place = str(path)
    if place in _TAKEN:
        return _TAKEN[place]
    return hash_path(path) if path.exists() else None


def take_hashes(hashes: Mapping[str, str | None]) -> None:
    """Use another process's answers of `hash_if_there` in this process, by path."""
    _TAKEN.update(hashes)


def hash_files(root: Path, files: Iterable[Path]) -> str:
    """Hash files: their names from `root` on, sizes and content.

    Times do not count, so copies on several machines are the same. All content is read once; then
    hashes are remembered (`remember_hashes`) for as long as a file's size, times and inode stay.
    """
    listed = list(files)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        contents = pool.map(_MEMORY.hash_of, listed)  # in order
        total = hashlib.sha256()
        for file, content in zip(listed, contents, strict=True):
            name = file.relative_to(root).as_posix()
            total.update(f"{name}\0{file.stat().st_size}\0{content}\n".encode())
    _MEMORY.save()
    return total.hexdigest()[:32]


def remember_hashes(file: Path) -> None:
    """Remember hashes of large files in `file` from now on; a teacher has 16 GB or more."""
    _MEMORY.open(file)


class _Memory:
    """Hashes of files by path, each with the size, times and inode it was taken at."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.known: dict[str, list[Any]] = {}
        self.changed = False

    def open(self, file: Path) -> None:
        """Use this file; one that is damaged counts as empty."""
        self.file = file
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            return
        for path, fact in found.items() if isinstance(found, dict) else ():
            if isinstance(fact, list) and [type(part) for part in fact] == [*[int] * 4, str]:
                self.known.setdefault(path, fact)

    def save(self) -> None:
        """Write the file, if there is one and something is new."""
        if self.file is None or not self.changed:
            return
        large = {path: fact for path, fact in self.known.items() if fact[0] >= REMEMBERED_BYTES}
        try:
            # Two runs at once may lose each other's entries, which are then hashed once more.
            write_text(self.file, json.dumps(large, indent=0) + "\n")
        except OSError:
            return  # a memory only: the run can do without
        self.changed = False

    def hash_of(self, path: Path) -> str:
        """SHA-256 of a file, from memory if the file is as it was."""
        place, now = str(path.absolute()), state_of(path)
        known = self.known.get(place)
        if known is not None and known[:-1] == now:
            return str(known[-1])
        found = sha256(path)
        # A file that changes while it is read, or just before, is not known by its times.
        settled = time.time() - max(now[1], now[2]) / 1e9 > SETTLED_SECONDS
        if settled and state_of(path) == now:
            self.known[place] = [*now, found]
            self.changed = self.changed or now[0] >= REMEMBERED_BYTES
        return found


def state_of(path: Path) -> list[int]:
    """Size, times of change of content and of inode, and inode of a file."""
    # The inode's time too: `touch -d` and `cp -p` set the other one back, and cannot set this.
    facts = os.stat(path)
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


# Of the process, as both are about files and not about a run.
_MEMORY = _Memory()
_TAKEN: dict[str, str | None] = {}


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(CRC_BLOCK):
            value = zlib.crc32(block, value)
    return value
