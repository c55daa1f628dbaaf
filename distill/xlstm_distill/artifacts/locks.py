"""Locks on files.

The system frees the locks of a process that dies. Some file systems have no locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from xlstm_distill.errors import RunError

YOUNG_SECONDS = 60.0
"""Age up to which nobody removes a mark that nobody holds."""
LOCK_TRIES = 10
"""How often a training asks for its lock, a tenth of a second apart.

`status` holds it for moments.
"""


def training_lock(run: Path, work: Path) -> Path:
    """The lock of a training in a run directory.

    It does not lie in the work directory, which is removed while the lock is held.
    """
    return run / ".locks" / f"training-{work.name}"


def open_lock(path: Path, *, new: bool = False) -> IO[str]:
    """Open a lock file, and make it where there is none; what it holds stays.

    `new` asks for a file that was not there. Links are not followed and nothing is cut: a link that
    somebody laid there must not cost the file behind it.

    Raises:
        RunError: it is a link, or no plain file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | (os.O_EXCL if new else 0), 0o666)
    except OSError as error:
        # FreeBSD says EMLINK where the others say ELOOP.
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            raise _no_lock(path) from None
        raise
    facts = os.fstat(descriptor)
    # A hard link is a plain file too; whoever holds a lock may write its name over it.
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
        os.close(descriptor)
        raise _no_lock(path)
    return os.fdopen(descriptor, "a")


def _no_lock(path: Path) -> RunError:
    return RunError(
        f"{path}: is a link or no plain file, and a lock must be one; remove it and run the "
        "command again."
    )


@contextlib.contextmanager
def exclusive(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a training or an evaluation, `what` (its artifact's label).

    Two at once would overwrite each other's files. Where the file system has no
    locks it goes on without, and says so.

    Raises:
        RunError: another process holds it.
    """
    with open_lock(path) as stream:
        try:
            _lock_soon(stream)
            _sign(stream)
        except BlockingIOError:
            raise busy(what, path) from None
        except OSError as error:
            say(
                f"{path}: cannot be locked ({error.strerror}); "
                "start no second run of this training meanwhile"
            )
        yield


def _lock_soon(stream: IO[str]) -> None:
    """Lock a file, after a few tries; raises BlockingIOError where another process keeps it."""
    for attempt in range(LOCK_TRIES):
        try:
            # Never a blocking lock: the same training twice is an error, and no reason to wait.
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == LOCK_TRIES - 1:
                raise
            time.sleep(0.1)


def _modified(path: Path) -> float:
    """When a file was changed last; now, if it is gone meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _sign(stream: IO[str]) -> None:
    """Note in a lock file who holds it; it is for messages only, so a full disk does no harm."""
    with contextlib.suppress(OSError):
        facts = json.dumps({"pid": os.getpid(), "host": platform.node()})
        stream.truncate(0)
        # Not through the stream: it would try again to write what failed when it is closed.
        os.write(stream.fileno(), f"{facts}\n".encode())


def busy(what: str, lock: Path) -> RunError:
    """The error where another process is at the same artifact; it names the holder of the lock."""
    holder = ""
    # Written by other processes, perhaps at this moment, and perhaps by another version.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads(lock.read_text())
        holder = f" (pid {int(facts['pid'])} on {facts['host']})"
    return RunError(f"{what}: another process{holder} is at it; wait for it, or stop it.")


@contextlib.contextmanager
def wait_for(path: Path, say_waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock file; wait while another process holds it.

    `say_waiting` is called once, before the wait, if there is one. Where the file system has no
    locks every process goes on without: work may then be done twice.
    """
    with open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if say_waiting is not None:
                say_waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # the file system has no locks
        yield


@contextlib.contextmanager
def marked(path: Path, text: str = "") -> Iterator[None]:
    """Hold a lock file of one's own, which tells others that this process lives; then remove it."""
    with open_lock(path, new=True) as file:
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            file.write(text)
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def working(locks: Path, label: str) -> Iterator[None]:
    """Show other shells that this process is at an artifact: a held file that says who and when."""
    stem = f"working-{label.replace('/', '-')}"
    for other in locks.glob(f"{stem}-*.json"):
        # A young mark may be one that its process has opened and not locked yet.
        if time.time() - _modified(other) > YOUNG_SECONDS:
            _remove_unheld(other, other)
    # A name of its own: several shares of a capture may be at one label.
    path = locks / f"{stem}-{uuid.uuid4().hex[:12]}.json"
    facts = {"label": label, "host": platform.node(), "pid": os.getpid(), "started": time.time()}
    with marked(path, json.dumps(facts) + "\n"):
        yield


def is_held(path: Path) -> bool | None:
    """Whether a process holds a lock file; None if there is no such file, or there are no locks."""
    try:
        # Not made where there is none: `status` touches nothing.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        # Shared, so that two `status` commands do not see each other's lock.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def remove_leftovers(final: Path, marks: Path) -> None:
    """Remove what killed processes left beside an artifact: drafts and artifacts moved aside.

    `marks` is the folder of the lock files that living processes hold, named like their drafts.
    """
    # The whole name must match: the drafts of `math-long` begin like those of `math`.
    pattern = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{12}}\.(partial|old)")
    for path in final.parent.iterdir():
        if pattern.fullmatch(path.name):
            _remove_unheld(path, marks / path.name)
    # A process that died after its rename has left no draft, and a mark of one.
    for mark in marks.iterdir() if marks.is_dir() else ():
        if pattern.fullmatch(mark.name):
            _remove_unheld(final.parent / mark.name, mark)


def _remove_unheld(directory: Path, mark: Path) -> None:
    """Remove what the holder of `mark` was writing, and the mark, unless that process lives."""
    # Which makes the mark where a draft has none.
    with open_lock(mark) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it lives, or nobody can know
            return
        shutil.rmtree(directory, ignore_errors=True)
        mark.unlink(missing_ok=True)
