"""Tokenise chunks of documents, in this process or in several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import transformers

from xlstm_distill.data.tokenization import Chunk, ChunkTokenizer, Tokens
from xlstm_distill.runtime.pool import worker_pool

DIED = (
    "data: a process that tokenises has died, perhaps for lack of memory; run the command again "
    "to go on from the last finished shard, with fewer data.workers if it happens again."
)

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
    with worker_pool(workers, DIED, _start_worker, (tokenizer,)) as pool:
        yield lambda chunk: pool.submit(_tokenize_in_worker, chunk), 2 * workers


def _tokenize_here(tokenizer: ChunkTokenizer, chunk: Chunk) -> Future[list[Tokens]]:
    future: Future[list[Tokens]] = Future()
    future.set_result(tokenizer(chunk))
    return future


def _start_worker(tokenizer: ChunkTokenizer) -> None:
    """Prepare a worker process: quiet, and on one core."""
    global _tokenizer_of_worker
    # One core a worker: the pool has as many workers as there are free cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Otherwise a warning for every document longer than the model's context.
    transformers.utils.logging.set_verbosity_error()
    _tokenizer_of_worker = tokenizer


def _tokenize_in_worker(chunk: Chunk) -> list[Tokens]:
    assert _tokenizer_of_worker is not None
    return _tokenizer_of_worker(chunk)
