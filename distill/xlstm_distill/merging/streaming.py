"""Work through saved weights in blocks, on all cores.

A tensor is cut into blocks of a fixed number of numbers, whatever its shape and its files. A block
is computed by one thread and sums over blocks are taken in their order: so results do not depend on
the number of threads, nor on how a model is dealt out to files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from xlstm_distill.errors import UserError
from xlstm_distill.merging.files import Entry, SavedWeights
from xlstm_kernels.registration import keep_freed_memory

BLOCK = 2**20
"""Numbers of a block. DARE's random numbers depend on it, and so do patches: it must stay."""
PIECE = 2**17
"""Numbers that are computed at a time: sums in float32 of so many stay near a core's cache."""
MOST_THREADS = 16
"""Enough for the fastest disks; each holds a few blocks of every expert."""
AHEAD = 4
"""Jobs of a thread that may wait for their turn."""

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Block:
    """The numbers `start` to `stop` of a tensor; it is the tensor's block `number`."""

    name: str
    number: int
    start: int
    stop: int

    def pieces(self) -> Iterator[slice]:
        """Cut it into pieces; their places count from the block's start."""
        count = self.stop - self.start
        for start in range(0, count, PIECE):
            yield slice(start, min(start + PIECE, count))


def blocks_of(name: str, count: int) -> list[Block]:
    """Cut a tensor of so many numbers into blocks."""
    starts = range(0, count, BLOCK)
    return [Block(name, n, start, min(start + BLOCK, count)) for n, start in enumerate(starts)]


def all_blocks(entries: Mapping[str, Entry]) -> list[Block]:
    """Cut all tensors, in the order in which they lie on the disk."""
    found: list[Block] = []
    for name, entry in entries.items():
        found += blocks_of(name, entry.count)
    return found


def threads() -> int:
    """Threads to work with: the cores that this process may use."""
    # torchrun gives each rank one thread of torch, and the other ranks only wait here.
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


def in_threads(work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Do jobs on all cores; yield results in the order of the jobs.

    The first job that raises ends the others.
    """
    keep_freed_memory()  # of small tensors: it took half of a merge's time
    count = threads()
    waiting: deque[Future[Result]] = deque()
    with _one_thread_each(), ThreadPoolExecutor(count) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                # Results that wait for an earlier one must not fill the memory.
                if len(waiting) > AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let torch compute in the thread that calls it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def hash_block(values: Tensor) -> bytes:
    """Hash the bytes of a block."""
    return hashlib.sha256(values.view(torch.uint8).numpy().data).digest()


def hash_of_weights(entries: Mapping[str, Entry], blocks: Mapping[str, list[bytes]]) -> str:
    """Hash weights from the hashes of their blocks, whichever files they lie in."""
    total = hashlib.sha256()
    for name in sorted(entries):
        entry = entries[name]
        total.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        for block in blocks[name]:
            total.update(block)
    return total.hexdigest()[:32]


def check_accounts(
    experts: Mapping[str, SavedWeights], base: SavedWeights | None = None, base_name: str = "align"
) -> None:
    """Check that all experts, and the seed student, have the same tensors.

    A base may have other dtypes: alignment keeps the teacher's.

    Raises:
        UserError: names the first tensor that is missing, extra, or of another shape or dtype.
    """
    names = list(experts)
    first = experts[names[0]].entries
    for name in names[1:]:
        _compare(names[0], first, name, experts[name].entries, dtypes=True)
    if base is not None:
        _compare(base_name, base.entries, names[0], first, dtypes=False)


def _compare(
    name: str,
    first: Mapping[str, Entry],
    other_name: str,
    other: Mapping[str, Entry],
    *,
    dtypes: bool,
) -> None:
    for key in sorted({*first, *other}):
        mine, theirs = first.get(key), other.get(key)
        if mine and theirs and mine.shape == theirs.shape:
            same = mine.dtype == theirs.dtype or not dtypes
        else:
            same = False
        if same:
            continue
        raise UserError(
            f"merge: experts differ in {key}: {name!r} has {_facts(mine)}, {other_name!r} has "
            f"{_facts(theirs)}; merge experts that were distilled from one student."
        )


def _facts(entry: Entry | None) -> str:
    if entry is None:
        return "none"
    return f"shape {entry.shape} in {str(entry.dtype).removeprefix('torch.')}"
