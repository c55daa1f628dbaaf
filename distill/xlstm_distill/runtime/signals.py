"""Signals that end a run in order: SIGTERM, SIGUSR1 and Ctrl-C (SIGINT).

Slurm sends SIGTERM or SIGUSR1 before it takes a machine away; Ctrl-C comes from a terminal. A
signal ends a command at once, with one exception: a training ends after the step it is in, with a
checkpoint. A second Ctrl-C ends a training at once too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from xlstm_distill.runtime.ranks import is_main_process

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends; Ctrl-C is told apart, since its exit code is another."""
EXIT_CODE = 75
"""Exit code after one of SIGNALS (EX_TEMPFAIL): start the same command again to go on."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it (128 + SIGINT)."""

FIRST_CTRL_C = b"\nCtrl-C: the training ends after this step. Press it again to end at once.\n"


class Stopped(BaseException):
    """A signal ended the run; what was finished is kept.

    It is no Exception, so that no error handler takes it.
    `agreed` says that all ranks stopped together, so that one of them can speak for all.
    """

    def __init__(self, message: str, *, interrupted: bool = False, agreed: bool = False) -> None:
        super().__init__(message)
        self.exit_code = INTERRUPTED if interrupted else EXIT_CODE
        self.agreed = agreed


class _State:
    """The pending signal, and whether a training defers it."""

    def __init__(self) -> None:
        self.pending: signal.Signals | None = None
        self.deferred = False
        self.ending = False

    def receive(self, number: int, _: FrameType | None) -> None:
        """Note one of SIGNALS, and end the run unless a training defers that."""
        # The first rank that ends makes torch's launcher send SIGTERM to ranks that are still
        # ending: they must keep the exit code they agreed on.
        if self.ending:
            return
        self.pending = signal.Signals(number)
        if not self.deferred:
            # Slurm signals every process of a job, and the batch script passes the signal on too:
            # the second must not end what is already ending.
            self.ending = True
            raise Stopped(_message(self.pending.name, "", "to go on"))

    def interrupt(self, number: int, _: FrameType | None) -> None:
        """Note the first Ctrl-C of a training; end the run at every other one."""
        if not self.deferred or self.pending is not None:
            raise KeyboardInterrupt
        self.pending = signal.Signals(number)
        if is_main_process():
            # Not print: a handler may run in the middle of another write to the same stream.
            os.write(2, FIRST_CTRL_C)


_state = _State()


def listen() -> None:
    """Handle the signals from now on, with none pending; only a process's main thread can."""
    global _state
    if threading.current_thread() is not threading.main_thread():
        return
    _state = _State()
    for number in SIGNALS:
        signal.signal(number, _state.receive)
    # A shell starts background jobs with SIGINT ignored: it is not for them.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _state.interrupt)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer signals in the block, which has to look at `pending` and raise `stopped` by itself.

    Raises:
        Stopped: the block ended without having seen a signal.
        KeyboardInterrupt: Ctrl-C was pressed while a signal was pending.
    """
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False
    # A signal may have come after the block's last look.
    if _state.pending is not None:
        interrupted = _state.pending is signal.SIGINT
        message = _message(_name(interrupted), "after the last step", "to go on")
        raise Stopped(message, interrupted=interrupted)


def end() -> None:
    """Let this process end by itself: it has failed, and torch's launcher sends SIGTERM to it."""
    _state.ending = True


def pending() -> signal.Signals | None:
    """Return the signal that this process got and that is still deferred."""
    return _state.pending


def stopped(where: str, goal: str, *, interrupted: bool) -> Stopped:
    """Make the error that ends all ranks together, once everything is saved.

    `where` says what was done before, `goal` what the same command will do ("to go on at step 9"),
    `interrupted` whether it was Ctrl-C. Another rank may be the one that got the signal.
    """
    _state.ending = True
    return Stopped(_message(_name(interrupted), where, goal), interrupted=interrupted, agreed=True)


def _name(interrupted: bool) -> str:
    if interrupted:
        return "Ctrl-C"
    # This rank may have got none, or Ctrl-C where another got SIGTERM.
    own = _state.pending
    return own.name if own is not None and own in SIGNALS else "a signal to another process"


def _message(name: str, where: str, goal: str) -> str:
    at = f"stopped by {name} {where}".rstrip()
    return f"{at}; run the same command again {goal}."
