"""The ranks of a run: who writes, who waits. Imports accelerate only where there are several."""

from __future__ import annotations

import atexit
import functools
import os
from datetime import timedelta
from typing import Any

from xlstm_distill.runtime.launcher import is_true

LONGEST_WAIT = timedelta(days=7)
"""How long processes wait for the one that captures, merges or evaluates; in training they wait as torch does."""


def on_cpu() -> bool:
    """Whether models run on the CPU: there is nothing else, or the launcher said so (use_cpu)."""
    import torch

    return is_true(os.environ, "ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_count() -> int:
    """Processes that a launcher (accelerate, torchrun, srun through either) started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes artifacts and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    """Wait until all processes are here, however long it takes; returns at once where there is one."""
    if process_count() > 1:
        import torch

        torch.distributed.barrier(group=_patient_group())


def process_index() -> int:
    """This process's number among those of the run, from 0."""
    return int(os.environ.get("RANK", "0"))


def all_agree(mine: bool) -> bool:
    """Whether the answer is yes on every process; all of them must ask."""
    if process_count() == 1:
        return mine
    import torch

    answer = torch.tensor([int(mine)])
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN, group=_patient_group())
    return bool(answer.item())


@functools.cache
def _patient_group() -> Any:
    """All processes, on the CPU, for waiting; the default group keeps torch's short time limits for training.

    A process that hangs in a training's collective is then noticed in minutes and does not hold all GPUs.
    """
    import torch
    from accelerate import PartialState

    # This starts the default group; on a machine without an accelerator it has to be told so.
    PartialState(cpu=on_cpu())
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    # Its threads have to end before the interpreter does, which otherwise now and then aborts a process that is done.
    atexit.register(_end_patient_group)
    return group


def _end_patient_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group(_patient_group())
    _patient_group.cache_clear()
