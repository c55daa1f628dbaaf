"""The ranks of a run: who writes, who waits. It imports accelerate only where there are several."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

from xlstm_distill.errors import RunError, UserError
from xlstm_distill.runtime.launcher import is_true

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=7)
"""How long ranks wait for rank 0 to capture, merge or evaluate; in training torch's limits hold."""


def on_cpu() -> bool:
    """Whether models run on the CPU: there is nothing else, or the launcher said `use_cpu`."""
    import torch

    return is_true(os.environ, "ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_count() -> int:
    """Return the number of processes that a launcher (accelerate, torchrun, srun) started."""
    # From the environment and not from torch: `--help` and `status` must not load it.
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Return this process's rank, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is rank 0, which writes artifacts and speaks to the user."""
    return process_index() == 0


def is_first_of_node() -> bool:
    """Whether this is the first rank of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def wait_for_everyone() -> None:
    """Barrier: wait for all ranks, however long it takes; returns at once where there is one."""
    if process_count() > 1:
        import torch

        torch.distributed.barrier(group=waiting_group())


def all_agree(mine: bool) -> bool:
    """Whether the answer is yes on every rank; all ranks must ask."""
    if process_count() == 1:
        return mine
    import torch

    # On the CPU: the waiting group is gloo, also where models are on GPUs. The least of all answers
    # is 1 only if every rank says yes.
    answer = torch.tensor([int(mine)])
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN, group=waiting_group())
    return bool(answer.item())


def scatter_object(values: Sequence[Any] | None) -> Any:
    """Return this rank's value of rank 0's list; the others pass None. All ranks must call."""
    if process_count() == 1:
        assert values is not None
        return values[0]
    import torch

    received: list[Any] = [None]
    sent = None if values is None else list(values)
    torch.distributed.scatter_object_list(received, sent, src=0, group=waiting_group())
    return received[0]


def gather_objects(value: Any) -> list[Any] | None:
    """Return the values of all ranks on rank 0, None elsewhere. All ranks must call."""
    if process_count() == 1:
        return [value]
    import torch

    gathered: list[Any] | None = [None] * process_count() if is_main_process() else None
    torch.distributed.gather_object(value, gathered, dst=0, group=waiting_group())
    return gathered


def from_rank_zero(compute: Callable[[], T]) -> T:
    """Return what `compute` gives on rank 0, on every rank; all ranks must ask.

    The others wait, however long it takes. What it raises on rank 0, a UserError or a RunError, is
    raised on all ranks; the answer must be made of plain values.
    """
    if process_count() == 1:
        return compute()
    import torch

    # Before rank 0 is busy: the ranks find each other within torch's time limit, which is shorter.
    group = waiting_group()
    answer: list[Any] = [None, None]
    error: BaseException | None = None
    if is_main_process():
        try:
            answer = ["done", compute()]
        except BaseException as raised:
            # Told before it is raised: the others would wait for an answer that never comes.
            error = raised
            answer = ["input" if isinstance(raised, UserError) else "failed", str(raised)]
    torch.distributed.broadcast_object_list(answer, src=0, group=group)
    if error is not None:
        error.speaks = True  # type: ignore[attr-defined]  # one rank prints it: this one
        raise error
    if answer[0] == "done":
        return cast("T", answer[1])
    told = UserError(answer[1]) if answer[0] == "input" else RunError(answer[1])
    told.speaks = False  # type: ignore[union-attr]
    raise told


def gathered(mine: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks; all ranks must ask. For small values."""
    if process_count() == 1:
        return [mine]
    import torch

    values: list[Any] = [None] * process_count()
    torch.distributed.all_gather_object(values, mine, group=waiting_group())
    return values


@contextlib.contextmanager
def whole_process() -> Iterator[None]:
    """Wrap all that a process does: one of several ranks then ends without the interpreter's end.

    Threads of a group, gloo's on CPUs, let go of a collective's tensors a moment after the caller
    does. In an interpreter that is ending by then they abort the process, or it ends by a
    segmentation fault: its work is done, and it has failed. Objects that hold the group keep these
    threads alive even where it was destroyed. Everything registered with `atexit` still runs.
    """
    code = 1

    def end() -> None:
        if process_count() > 1:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):  # gone, or closed
                    stream.flush()
            os._exit(code)

    atexit.register(end)  # before any other, so that it comes last
    try:
        yield
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise


@functools.cache
def waiting_group() -> Any:
    """Return the group of all ranks on the CPU that `wait_for_everyone` and `all_agree` use.

    The default group keeps torch's short time limits for training: a rank that hangs in one of its
    collectives is then noticed within minutes, and does not hold all GPUs.
    """
    import torch
    from accelerate import PartialState

    # This starts the default group. On a machine without an accelerator it has to be told so.
    PartialState(cpu=on_cpu())
    # A collective itself: all ranks come here at their first barrier or question.
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    # Its threads must end before the interpreter does, or a finished process may abort at its end.
    atexit.register(_end_waiting_group)
    return group


def _end_waiting_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group(waiting_group())
    # A group of a destroyed process group must not be used again; the next call makes a new one.
    waiting_group.cache_clear()
