"""Worker processes that end with their parent and leave signals to it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from xlstm_distill.errors import RunError

SIGNAL_SECONDS = 0.5
"""How far apart the processes of a job may get the same signal (seconds)."""


def free_cores() -> int:
    """Cores that this process may use besides its own; ranks of one machine share them."""
    if hasattr(os, "sched_getaffinity"):
        # A Slurm job may use fewer cores than the machine has.
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(cores // ranks - 1, 0)


@contextlib.contextmanager
def worker_pool(
    workers: int, died: str, start: Callable[..., None] | None = None, arguments: Any = ()
) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of processes, which end with the block; each begins with `start(*arguments)`.

    Raises:
        RunError: a worker died; `died` is the message.
    """
    # Spawned, because a fork of a process with threads or a device can hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (start, arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        # The signal that ended the worker may be on its way to this process too. After this wait
        # it has arrived and counts as a stop, not as an error.
        time.sleep(SIGNAL_SECONDS)
        raise RunError(died) from error
    finally:
        # Also after an error: workers that are left would keep the program from ending.
        pool.shutdown(wait=True, cancel_futures=True)


def _start(start: Callable[..., None] | None, arguments: Any) -> None:
    """Prepare a worker process: ended by its parent alone."""
    # A terminal sends these to the whole process group. The parent handles them, finishes what is
    # under way and ends its workers, by SIGTERM if need be.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(*arguments)


def _end_with_parent() -> None:
    """End this worker when its parent is gone.

    A killed parent cannot end its workers. They would wait for work from it forever.
    """
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
