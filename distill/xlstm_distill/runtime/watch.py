"""End this rank within seconds when its launcher is gone, or when another rank has failed.

A rank that is left alone would otherwise train on as an orphan and keep its locks, or wait in a
collective until the time limit, on GPUs that are paid for. A thread looks once a second. It runs
also while the main thread waits in a collective, which holds no interpreter lock.

Ranks tell each other of a failure through torch's key-value store, which the launcher (or rank 0)
serves: a rank that fails notes it there before it ends. This module loads no torch by itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Protocol

from xlstm_distill.runtime.signals import EXIT_CODE

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""Time for a rank to end by itself once another has failed."""
LAUNCHER = "XLSTM_DISTILL_LAUNCHER"
"""Variable with the process id of `--launch`, for the ranks it starts."""
FAILED_CODE = 1


class KeyValueStore(Protocol):
    """What is used of torch's TCPStore."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a number and return the sum."""

    def check(self, keys: list[str], /) -> bool:
        """Whether there are values for these keys."""

    def get(self, key: str, /) -> bytes:
        """Return a value; waits for it."""

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""


class Watch:
    """Looks after the launcher and the other ranks; `end` ends this process at once.

    `launcher` is its process id, None where this process has none to look after. `connect` reaches
    the ranks' store; it returns None as long as it cannot.
    """

    def __init__(
        self,
        launcher: int | None,
        connect: Callable[[], KeyValueStore | None],
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.launcher, self.connect, self.end, self.clock = launcher, connect, end, clock
        self.store: KeyValueStore | None = None
        # Without torch's launcher, rank 0 serves the store.
        self.serves = not _launcher_serves() and os.environ.get("RANK") == "0"
        # A launcher that starts its ranks again keeps its store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.failed = f"xlstm-distill/failed/{attempt}"
        self.code_of_first = f"xlstm-distill/exit-code/{attempt}"
        self.code: int | None = None
        self.failed_since: float | None = None
        self.lost = False
        self.over = threading.Event()
        self.speaking, self.spoken = threading.Lock(), False

    def run(self) -> None:
        """Look until the process ends; the target of the thread."""
        while not self.over.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Look once."""
        if self._is_orphan():
            self.end(EXIT_CODE)
        if self.lost:
            return
        self.store = self.store or self.connect()
        if self.store is not None:
            self._look_for_failures(self.store)

    def _is_orphan(self) -> bool:
        """Whether the launcher is gone; says so, once."""
        if self.launcher is None or os.getppid() == self.launcher:
            return False
        with self.speaking:
            if not self.spoken:
                _say(
                    f"error: the launcher (process {self.launcher}) is gone, so this run ends; run "
                    "the same command again to go on."
                )
            self.spoken = True
        return True

    def _look_for_failures(self, store: KeyValueStore) -> None:
        if self.failed_since is None:
            try:
                if not store.check([self.failed]):
                    return
                # Asked now: where rank 0 serves the store and fails, it is soon gone.
                self.failed_since, self.code = self.clock(), self.code or self._code(store)
            except Exception:  # torch has several types for it, and must be loaded to name them
                # Never asked again, as torch prints a page for every question. What is left are
                # torch's time limits: a lost connection alone must not end a healthy run.
                self.lost = True
        elif self.clock() - self.failed_since >= GRACE_SECONDS:
            self.end(self.code or FAILED_CODE)

    def fail(self, code: int) -> tuple[bool, int]:
        """Tell the others that this rank fails, with this exit code.

        Returns whether it is the first, which alone speaks to the user, and the code to end with:
        that of the first. What the others see is only that the first is gone.
        """
        if self._is_orphan():
            # Another rank may have ended first, and what this one saw is only that.
            return False, EXIT_CODE
        if self.failed_since is not None and self.code is not None:
            return False, self.code
        self.code = code
        # Where no store is to be had, nobody else can have told: speak.
        with contextlib.suppress(Exception):
            self.store = self.store or self.connect()
            if self.store is not None and not self.lost:
                # Before the count: whoever sees that must find a code.
                if not self.store.check([self.failed]):
                    self.store.set(self.code_of_first, str(code))
                if self.store.add(self.failed, 1) > 1:
                    self.code = self._code(self.store)
                    return False, self.code
                if self.serves:
                    # Otherwise the others find the store gone, and not what is in it.
                    time.sleep(2 * POLL_SECONDS)
        return True, code

    def _code(self, store: KeyValueStore) -> int:
        with contextlib.suppress(Exception):
            return int(store.get(self.code_of_first))
        return FAILED_CODE


_watch: Watch | None = None


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Look after this process's launcher and the other ranks from now on, if it has any."""
    global _watch
    if _watch is not None:
        _watch.over.set()
        _watch = None
    launcher = _launcher(environment)
    # A single process that was started by hand outlives its shell: there is nothing to look after.
    if launcher is not None or int(environment.get("WORLD_SIZE", "1")) > 1:
        _watch = Watch(launcher, _connect)
        threading.Thread(target=_watch.run, daemon=True, name="watch").start()


def stop() -> None:
    """Look no more, since all is done; after a failure the watch goes on to the end."""
    if _watch is not None and _watch.code is None:
        _watch.over.set()


def fail(code: int) -> tuple[bool, int]:
    """Tell the other ranks that this one fails; see `Watch.fail`."""
    return (True, code) if _watch is None else _watch.fail(code)


def _connect() -> KeyValueStore | None:
    """Reach the store of the ranks; None where there is none, or not yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_PORT" not in os.environ:
        return None
    # Not imported here: this thread must not disturb an import that the main thread is at.
    loaded: list[Any] = [sys.modules.get(name) for name in ("torch", "torch.distributed")]
    if any(m is None or getattr(m.__spec__, "_initializing", False) for m in loaded):
        return None
    distributed = loaded[1]
    # Torch prints a page for every attempt that fails: wait until rank 0 serves it.
    if not (_launcher_serves() or distributed.is_initialized()):
        return None
    # A connection of its own: calls on the process group's can wait for minutes, and hold it.
    with contextlib.suppress(Exception):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=GRACE_SECONDS)
        store: KeyValueStore = distributed.TCPStore(address, port, is_master=False, timeout=limit)
        return store
    return None


def _launcher_serves() -> bool:
    """Whether torch's launcher serves the store; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _launcher(environment: Mapping[str, str]) -> int | None:
    """Return the process id of what started this rank; None for a process that stands alone."""
    if LAUNCHER in environment:
        return int(environment[LAUNCHER])
    # Set by torch's launcher, which accelerate launch uses for several processes, and by
    # accelerate for a single one. RANK alone can be set by hand, in a shell that may be closed.
    if "TORCHELASTIC_RUN_ID" in environment or "ACCELERATE_MIXED_PRECISION" in environment:
        return os.getppid()
    return None


def _say(text: str) -> None:
    """Write a line to stderr, once for each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # Not print: the main thread may hold the stream's lock, and the terminal may be gone.
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())
