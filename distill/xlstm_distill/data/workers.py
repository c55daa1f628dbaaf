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
"""How far apart processes of a job may get the same signal (seconds)."""

Submit = Callable[[Chunk], "Future[list[Tokens]]"]

_tokenizer_of_worker: ChunkTokenizer | None = None


@contextlib.contextmanager
def tokenizing(tokenizer: ChunkTokenizer, workers: int) -> Iterator[tuple[Submit, int]]:
    """Give a function that tokenises chunks, and how many of a source may be under way at once.

    With `workers` processes they are spawned, since the parent may hold threads and a device; without, a chunk is
    tokenised as it is submitted.

    Raises:
        RunError: a worker died.
    """
    if workers == 0:
        yield lambda chunk: _done(tokenizer, chunk), 1
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer,))
    try:
        yield lambda chunk: pool.submit(_work, chunk), 2 * workers
    except BrokenProcessPool as error:
        time.sleep(SIGNAL_SECONDS)  # a SIGTERM to all processes raises Stopped here
        raise RunError(
            "data: a process that tokenises has died, perhaps for lack of memory; run the command again to go on from "
            "the last finished shard, with fewer data.workers if it happens again."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done(tokenizer: ChunkTokenizer, chunk: Chunk) -> Future[list[Tokens]]:
    future: Future[list[Tokens]] = Future()
    future.set_result(tokenizer(chunk))
    return future


def _start_worker(tokenizer: ChunkTokenizer) -> None:
    global _tokenizer_of_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(
            number, signal.SIG_IGN
        )  # the parent gets them too, and ends its workers: by SIGTERM if need be
    transformers.utils.logging.set_verbosity_error()  # long documents are no mistake here
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer_of_worker = tokenizer


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for its queue for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> list[Tokens]:
    assert _tokenizer_of_worker is not None
    return _tokenizer_of_worker(chunk)
