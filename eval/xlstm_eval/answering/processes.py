"""Answer the batches of a small model in several processes beside each other.

More threads hardly make a small model faster on a CPU: its operators are over before the threads
have met. So each process takes one core and whole batches. The processes are forks: they share the
weights, load nothing, and end with this process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, TypeVar

from xlstm_eval.answering.batches import Batch
from xlstm_eval.answering.journal import Answered
from xlstm_eval.records import EvalError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL = 50_000_000
"""Parameters up to which a model's batches are answered beside each other."""
TOKENS_AT_ONCE = 1 << 18
"""Tokens of all batches that are answered at a time: it bounds the memory of their activations."""
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

Item = TypeVar("Item")
Found = TypeVar("Found")
_compute: Callable[[Any], Any] | None = None  # of a process that was forked


def processes_for(model: PreTrainedModel, ranks: int) -> int:
    """Return how many processes answer a model's batches at most: one for each thread, or one.

    Other systems than Linux cannot fork safely behind the libraries that are loaded here.
    """
    import torch

    alone = ranks == 1 and sys.platform == "linux" and model.device.type == "cpu"
    return torch.get_num_threads() if alone and model.num_parameters() <= SMALL else 1


def answer_side_by_side(
    compute: Callable[[Batch], Answered], batches: Sequence[Batch], processes: int
) -> Iterator[Answered]:
    """Yield the answers to batches as they come; with several processes the largest begin first.

    Raises:
        EvalError: a process was killed.
    """
    largest = max((batch.cost for batch in batches), default=1)
    count = min(processes, max(1, TOKENS_AT_ONCE // max(1, largest)))
    if count > 1:
        batches = sorted(batches, key=lambda batch: -batch.cost)
    return side_by_side(compute, batches, count)


def side_by_side(
    compute: Callable[[Item], Found], items: Sequence[Item], processes: int
) -> Iterator[Found]:
    """Yield compute(item) of all items as they come, by at most so many processes.

    What `compute` holds is not sent to them; items and results are. Where the system has no
    semaphores (no /dev/shm) or allows no more processes, this process computes alone.

    Raises:
        EvalError: a process was killed.
    """
    count = min(processes, len(items))
    if count < 2:
        yield from map(compute, items)
        return
    try:
        pool = concurrent.futures.ProcessPoolExecutor(
            count, multiprocessing.get_context("fork"), _begin, (compute, os.getpid())
        )
    except (OSError, NotImplementedError):
        yield from map(compute, items)
        return
    before = multiprocessing.active_children()
    asked, over = None, False
    try:
        # A signal may come here already: what was begun has to end.
        with _quiet_fork(), contextlib.suppress(OSError):
            asked = [pool.submit(_apply, item) for item in items]
        mine = _others(before)
        if asked is None:
            _end(mine)
            yield from map(compute, items)
            return
        for done in concurrent.futures.as_completed(asked):
            yield done.result()
        over = True
    except BrokenProcessPool:
        raise EvalError(
            f"evaluate: one of {count} processes that answered was killed; the memory may be too "
            "small for them. OMP_NUM_THREADS=1 answers in a single one."
        ) from None
    finally:
        if not over:
            # Whoever stops an evaluation does not wait for batches that it will ask for again.
            _end(_others(before) if asked is None else mine)
        pool.shutdown(cancel_futures=True)


def _others(before: Sequence[BaseProcess]) -> list[BaseProcess]:
    return [child for child in multiprocessing.active_children() if child not in before]


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _begin(compute: Callable[[Any], Any], parent: int) -> None:
    """Prepare a process: one thread, no signals but the end of its parent."""
    import torch

    global _compute
    _compute = compute
    # Ctrl-C and Slurm's signals reach every process; the parent alone handles them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be followed
        os._exit(1)
    torch.set_num_threads(1)
    _keep_memory()


def _keep_memory() -> None:
    """Have glibc reuse freed memory: a fresh page for each large tensor is a tenth of the time."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # another C library
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _apply(item: Any) -> Any:
    assert _compute is not None
    # Grad mode belongs to a thread, and a process begins with its default.
    import torch

    with torch.no_grad():
        try:
            return _compute(item)
        except Exception as error:
            if _can_be_sent(error):
                raise
            # Sent as it is, it would break the pool as if this process had been killed.
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _can_be_sent(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


@contextlib.contextmanager
def _quiet_fork() -> Iterator[None]:
    """Keep the tokenizers' threads out of forks; without this setting they warn of each."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
