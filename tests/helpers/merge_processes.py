"""Merge a run's experts in several processes, by its saved recipe. For test_tuning.py.

Arguments: run directory, number of processes. They are forked: only the first one imports.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch

from xlstm_distill.artifacts import Run
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages.merge import merge
from xlstm_distill.stages.status.comparison import saved_lineage


def child(directory: Path, rank: int, processes: int, port: int) -> None:
    """Merge as one of the processes."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    lineage = saved_lineage(directory)
    assert lineage is not None
    lineage.share_hashes()
    merge(lineage, Run.open(directory, lineage.recipe), QuietConsole())


def main() -> int:
    """Fork, wait, and return the worst exit code."""
    directory, processes = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(directory, rank, processes, port)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


if __name__ == "__main__":
    sys.exit(main())
