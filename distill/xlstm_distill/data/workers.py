"""Tokenise chunks of documents, in this process or in several."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process

import transformers

from xlstm_distill.data.tokenization import Chunk, ChunkTokenizer, Tokens
from xlstm_distill.errors import RunError

SIGNAL_SECONDS = 0.5
"""How far apart the processes of a job may get the same signal (seconds)."""

Submit = Callable[[Chunk], "Future[list[Tokens]]"]

# Set once in each worker process by `_start_worker`; None in every other process. A pool sends its
# tasks by pickle, and with a chunk of text the tokenizer would be the larger part.
_tokenizer_of_worker: ChunkTokenizer | None = None


@contextlib.contextmanager
def tokenizing(tokenizer: ChunkTokenizer, workers: int) -> Iterator[tuple[Submit, int]]:
    """Give a function that tokenises chunks, and how many of a source may be under way at once.

    With 0 workers, this process tokenises a chunk as soon as it is submitted.

    Raises:
        RunError: a worker died.
    """
    if workers == 0:
        yield lambda chunk: _tokenize_here(tokenizer, chunk), 1
        return
    # Spawned, because a fork of a process with threads or a device can hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer,))
    try:
        yield lambda chunk: pool.submit(_tokenize_in_worker, chunk), 2 * workers
    except BrokenProcessPool as error:
        # The signal that ended the worker may be on its way to this process too. After this wait
        # it has arrived and counts as a stop, not as an error.
        time.sleep(SIGNAL_SECONDS)
        raise RunError(
            "data: a process that tokenises has died, perhaps for lack of memory; run the command "
            "again to go on from the last finished shard, with fewer data.workers if it happens "
            "again."
        ) from error
    finally:
        # Also after an error: workers that are left would keep the program from ending.
        pool.shutdown(wait=True, cancel_futures=True)


def _tokenize_here(tokenizer: ChunkTokenizer, chunk: Chunk) -> Future[list[Tokens]]:
    future: Future[list[Tokens]] = Future()
    future.set_result(tokenizer(chunk))
    return future


def _start_worker(tokenizer: ChunkTokenizer) -> None:
    """Prepare a worker process: quiet, on one core, and ended by its parent alone."""
    global _tokenizer_of_worker
    # One core a worker: the pool has as many workers as there are free cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A terminal sends these to the whole process group. The parent handles them, finishes what is
    # under way and ends its workers, by SIGTERM if need be.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Otherwise a warning for every document longer than the model's context.
    transformers.utils.logging.set_verbosity_error()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer_of_worker = tokenizer


def _end_with_parent() -> None:
    """End this worker when its parent is gone.

    A killed parent cannot end its workers. They would wait for work from it forever.
    """
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize_in_worker(chunk: Chunk) -> list[Tokens]:
    assert _tokenizer_of_worker is not None
    return _tokenizer_of_worker(chunk)
