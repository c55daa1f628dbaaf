"""Being asked to stop: SIGTERM, and SIGUSR1, which Slurm sends before it takes a machine away, end a run in order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""What the command line returns then (EX_TEMPFAIL): start the same command again to go on."""


class Stopped(BaseException):
    """The run was asked to stop; what it had finished is kept. Not an error, so no handler of errors takes it."""


class _Request:
    """Whether somebody asked, and whether a stage wants to end by itself."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.deferred = False

    def receive(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if not self.deferred:
            raise Stopped(self.message("between two steps"))

    def message(self, where: str) -> str:
        return f"stopped by {self.name} {where}; run the same command again to go on."


_request = _Request()


def listen() -> None:
    """Take the signals from now on; only a process's main thread can."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _request.receive)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Leave it to the block to look for a request and to end at a point of its choice.

    Raises:
        Stopped: the block has ended without having seen a request.
    """
    _request.deferred = True
    try:
        yield
    finally:
        _request.deferred = False
    if requested():
        raise Stopped(_request.message("after the last step"))


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _request.name is not None


def stop(where: str) -> Stopped:
    """The exception to raise when all is saved; another process may be the one that was asked."""
    _request.name = _request.name or "a signal to another process"
    return Stopped(_request.message(where))
