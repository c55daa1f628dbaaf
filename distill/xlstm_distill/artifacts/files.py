"""Write files and folders so that other processes see them complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from xlstm_distill.errors import RunError

FLUSH_THREADS = 8
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What only writing answers: no room, or none left for this user or this file."""
NO_DIRECTORY_FLUSH = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
)
"""What file systems answer that cannot flush a directory by itself."""


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
    except OSError as error:
        # The system names no file where writing fails: a full disk must say which one it is.
        if error.filename is None and error.errno in FULL:
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    # A rename changes the directory, which has a cache of its own.
    flush_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) as `written_whole` does."""
    with written_whole(path) as file:
        file.write(text.encode())


class OpenFolder:
    """A folder that is held open: its files are found wherever it is moved.

    A training reads for days. Meanwhile another command may put other settings' files in the place
    of those that it reads; a name that is looked up late would find the wrong ones.

    Raises:
        OSError: there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, self.descriptor)

    def open(self, name: str) -> BinaryIO:
        """Open one of its files for reading.

        Raises:
            RunError: the folder was removed.
            OSError: the file cannot be opened.
        """
        try:
            return os.fdopen(os.open(name, os.O_RDONLY, dir_fd=self.descriptor), "rb")
        except OSError as error:
            # A local disk has the folder still, without its files; NFS has forgotten it.
            gone = error.errno == errno.ENOENT and self._was_moved()
            if gone or error.errno == errno.ESTALE:
                raise RunError(
                    f"{self.path / name}: another command removed it while this one was reading; "
                    "run the command again."
                ) from error
            if error.filename is not None:
                error.filename = str(self.path / name)
            raise

    def _was_moved(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except OSError:
            return True


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
    """Wait until the names in a directory are on the disk, where the file system can do that.

    Raises:
        OSError: the disk failed or is full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Only these: EIO and ENOSPC mean that names are lost.
        if error.errno not in NO_DIRECTORY_FLUSH:
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Wait until all files and names below a folder, and the folder's own, are on the disk."""
    files: list[Path] = []
    folders: list[Path] = []
    for here, _, names in os.walk(folder):
        folders.append(Path(here))
        files += [Path(here) / name for name in names]
    with ThreadPoolExecutor(FLUSH_THREADS) as pool:
        for _ in pool.map(_flush_listed, files):  # raises what a thread raised
            pass
    # From below: a folder is only whole when those in it are.
    for path in reversed(folders):
        flush_directory(path)


def _flush_listed(path: Path) -> None:
    """Flush a file of a list that was made a moment ago."""
    try:
        flush(path)
    except FileNotFoundError:
        # Another process, which writes the same once more, has renamed or removed its own.
        if not path.name.endswith(".partial"):
            raise


def flush_upwards(folder: Path, top: Path) -> None:
    """Flush a folder and those above it up to `top`: any of them may have just been made."""
    flush_directory(folder)
    while folder != top and folder != folder.parent:
        folder = folder.parent
        flush_directory(folder)


def remove_directory(path: Path, name: str) -> None:
    """Remove a directory under another name, so that a killed process leaves no half of it.

    `name` is that of the artifact, whose next publishing removes what is left.
    """
    going = path.with_name(f".{name}.{uuid.uuid4().hex[:12]}.old")
    path.rename(going)
    shutil.rmtree(going)


def replace_directory(source: Path, final: Path, kept: Path | None = None) -> None:
    """Rename a complete directory into place, on the disk; a failure leaves both as they were.

    A directory that was there moves to `kept`, beside it, or is removed when the new one is on the
    disk.
    """
    flush_tree(source)
    # Two renames, since one cannot replace a folder that holds files. Between them there is no
    # artifact: a process that dies there has it made again, or finds it at `kept`.
    old = final.parent / f".{final.name}.{uuid.uuid4().hex[:12]}.old"
    if kept is not None and kept.exists():
        # An earlier one of the same fingerprint: the newer of two equals stays.
        shutil.rmtree(kept)
    moved = final.exists()
    if moved:
        final.rename(old if kept is None else kept)
    try:
        source.rename(final)
    except OSError:
        if moved:
            (old if kept is None else kept).rename(final)
        raise
    flush_directory(final.parent)
    if source.parent != final.parent:
        flush_directory(source.parent)
    shutil.rmtree(old, ignore_errors=True)
