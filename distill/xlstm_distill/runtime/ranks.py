"""The ranks of a run: who writes, who waits. It imports accelerate only where there are several."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from xlstm_distill.errors import RunError
from xlstm_distill.runtime.launcher import is_true

LONGEST_WAIT = timedelta(days=7)
"""How long ranks wait for rank 0 to capture, merge or evaluate; in training torch's limits hold."""

PATIENCE_SECONDS = 30.0
"""How long a rank waits to be ended by the launcher when another rank has failed (seconds)."""


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


@contextlib.contextmanager
def failing_with_another() -> Iterator[None]:
    """Leave the error message to another rank that failed while this one waited for it.

    Raises:
        RunError: the launcher has not ended this process because of that.
    """
    try:
        yield
    except RuntimeError as error:  # gloo: connection closed by peer
        # The launcher sends SIGTERM as soon as the other rank has ended, and that one has said why.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE_SECONDS)
        raise RunError("another process has failed, and said why; this one ends too.") from error


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
