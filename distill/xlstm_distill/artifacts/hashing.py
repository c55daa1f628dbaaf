"""Hashes of values, files and folders, and checksums that tell damage."""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WHOLE_HASH_BYTES, END_BYTES = 64 * 2**30, 2**20

HASH_THREADS = 4
CRC_BLOCK = 2**24


def digest(value: Any) -> str:
    """Hash a JSON value, independent of the order of its keys."""
    # Keys, separators and NaN are fixed: the text must be the same on every machine and for ever.
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def hash_path(path: Path) -> str:
    """Hash a file or a folder: names, sizes and content.

    Up to 64 GiB in sum all content counts. Beyond that, the first and last MiB of each file and its
    time of change do; a copy that does not keep the times then counts as another folder. The answer
    is remembered for as long as sizes and times of change stay.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found: list[tuple[Path, int, int]] = []
    for file in files:
        stat = file.stat()
        found.append((file, stat.st_size, stat.st_mtime_ns))
    return _hash_files(path, tuple(found))


# Sizes and times are arguments, so a file that changes during a run is hashed again.
@functools.lru_cache(maxsize=256)
def _hash_files(path: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    whole = sum(size for _, size, _ in files) <= WHOLE_HASH_BYTES
    total = hashlib.sha256()
    hash_file = _whole_hash if whole else _ends_hash
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        # Threads are enough: hashlib gives up the interpreter lock for large blocks. `map` keeps
        # the order.
        contents = pool.map(hash_file, [file for file, _, _ in files])
        for (file, size, changed), content in zip(files, contents, strict=True):
            name = file.relative_to(path) if file != path else file.name
            # Where the whole content is hashed, times do not count: a copy is the same.
            time = "" if whole else changed
            total.update(f"{name}\0{size}\0{time}\0".encode() + content)
    return total.hexdigest()[:32]


def _whole_hash(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _ends_hash(file: Path) -> bytes:
    with file.open("rb") as stream:
        first = stream.read(END_BYTES)
        # A file shorter than the block gives all its bytes twice, which does no harm.
        stream.seek(max(0, file.stat().st_size - END_BYTES))
        return hashlib.sha256(first + stream.read()).digest()


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(CRC_BLOCK):
            value = zlib.crc32(block, value)
    return value
