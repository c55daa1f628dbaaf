"""Write files and folders so that other processes see them complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears as `path` only when it is complete and on the disk.

    Write into the file the block gets. An earlier file of this name stays until the block ends, and
    for good if the block raises. Several processes may write the same path: the last one counts.
    """
    # A random name, so that two writers of the same path do not write into one file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            # Before the rename: otherwise a power failure can leave the name with an empty file.
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    # A rename changes the directory, which has a cache of its own.
    flush_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) as `written_whole` does."""
    with written_whole(path) as file:
        file.write(text.encode())


def remove_partials(directory: Path) -> None:
    """Remove what killed processes left in `written_whole`; no process may be writing there."""
    for partial in directory.glob(".*.partial"):
        if partial.is_file():
            partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the content of a file that somebody else wrote is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk, where the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(source: Path, final: Path) -> None:
    """Rename a complete directory into place; a directory that was there is removed afterwards."""
    # Two renames, since one cannot replace a folder that holds files. Between them there is no
    # artifact: a process that dies there has it made again.
    old = final.parent / f".{final.name}.{uuid.uuid4().hex[:12]}.old"
    if final.exists():
        final.rename(old)
    source.rename(final)
    shutil.rmtree(old, ignore_errors=True)
