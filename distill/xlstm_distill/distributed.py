"""Several processes in one run: one writes, the others wait. Imports accelerate only where there are several."""

from __future__ import annotations

import os
from datetime import timedelta

LONGEST_WAIT = timedelta(days=7)
"""How long processes wait for the one that captures, merges or evaluates."""


def process_count() -> int:
    """Processes that a launcher (accelerate, torchrun, srun through either) started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes artifacts and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    """Wait until all processes are here; returns at once where there is one."""
    if process_count() > 1:
        import torch
        from accelerate import PartialState

        # The first call starts the process group; on a machine without an accelerator it has to be told so.
        PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT).wait_for_everyone()


def process_index() -> int:
    """This process's number among those of the run, from 0."""
    return int(os.environ.get("RANK", "0"))


def all_agree(mine: bool) -> bool:
    """Whether the answer is yes on every process; all of them must ask."""
    if process_count() == 1:
        return mine
    import torch
    from accelerate import PartialState

    answer = torch.tensor([int(mine)], device=PartialState(cpu=not torch.accelerator.is_available()).device)
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN)
    return bool(answer.item())
