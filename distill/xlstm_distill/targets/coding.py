"""Code rows of targets in worker processes, beside the teacher's forward pass. Loads no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from xlstm_distill.runtime.pool import worker_pool
from xlstm_distill.targets.codec import Floats, Ints, decode, encode, in_stored_order, kl_error

DIED = (
    "capture: a process that codes targets has died, perhaps for lack of memory; run the command "
    "again to go on from the last finished shard, with fewer capture.workers if it happens again."
)


@dataclass(frozen=True)
class KeptRow:
    """What is kept of a row's K tokens, most likely ids first; n ids in all.

    counts (K,) ids of each token; ids (n,) and log_probs (n,) fp32, token after token; tail (K,)
    fp32. `measured` asks for the KL error of the coding.
    """

    counts: Ints
    ids: Ints
    log_probs: Floats
    tail: Floats
    vocabulary: int
    measured: bool


@dataclass(frozen=True)
class CodedRow:
    """A row's bytes, its tokens, ids in all, and the sum of its KL error if it was measured."""

    data: bytes
    tokens: int
    kept: int
    kl_error: float | None


def code(row: KeptRow) -> CodedRow:
    """Code a row: a pure function, so that the bytes do not depend on who does it."""
    arranged = in_stored_order(row.counts, row.ids, row.log_probs, row.tail)
    data = encode(arranged, row.vocabulary)
    tokens = len(row.counts)
    error = None
    if row.measured:
        # Decoded again, which takes longer than the coding itself.
        decoded = decode(data, tokens, row.vocabulary)
        error = float(kl_error(arranged, decoded).sum())
    return CodedRow(data, tokens, len(row.ids), error)


@dataclass(frozen=True)
class Coder:
    """Codes rows, here or in workers; at most `ahead` rows should be under way at once."""

    submit: Callable[[KeptRow], Future[CodedRow]]
    ahead: int


def _code_here(row: KeptRow) -> Future[CodedRow]:
    future: Future[CodedRow] = Future()
    future.set_result(code(row))
    return future


HERE = Coder(_code_here, 0)
"""Codes each row in this process as soon as it is submitted."""


@contextlib.contextmanager
def coding(workers: int) -> Iterator[Coder]:
    """Give a coder with so many worker processes, each on one core; 0 codes in this process.

    Rows under way are bounded: two for each worker. With 8 workers, 4096-token rows and 256 ids a
    token these are 16 x 8.4 MB, and 16 x 1 MB at a mean of 30 ids.

    Raises:
        RunError: a worker died.
    """
    if workers == 0:
        yield HERE
        return
    with worker_pool(workers, DIED) as pool:
        yield Coder(lambda row: pool.submit(code, row), 2 * workers)
