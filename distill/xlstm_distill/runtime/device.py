"""Facts of the device that a process computes on, and of its host: memory, and published rate.

Also how a process on a CPU holds its memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# "H100 PCIe" before "H100", whose word its name has too.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362}
"""Published dense bf16 rate of GPUs (TFLOP/s), by words of their names; the first match counts."""


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # On Linux a process's ru_maxrss starts at its parent's size; VmHWM (KiB) does not.
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Parameters of glibc's mallopt (malloc.h), and the most that it takes for the second.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20
KEPT = 2**30
"""Freed bytes at the end of the heap that a process keeps while it trains on a CPU."""


@contextlib.contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Keep what is freed inside, on a CPU with glibc: the next step needs as much again.

    The system would take it back and hand it out anew, zeroed, page by page. Measured: up to a
    tenth of a training step.
    """
    glibc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if not all(hasattr(glibc, name) for name in ("mallopt", "malloc_trim")):
        yield
        return
    assert glibc is not None
    glibc.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    glibc.mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        # What glibc's own adjustment comes to, once such large blocks have been freed.
        glibc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
        glibc.malloc_trim(0)


def host_memory() -> int:
    """Return the bytes of this machine's memory, or what a container may have of them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def usable_bytes(device: torch.device) -> int:
    """Return the memory of a CUDA device that this process may have: what it holds and is free."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def forget_peak() -> None:
    """Let `peak_bytes` begin again at what is held now; on macOS the peak cannot be forgotten."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def published_peak(device: torch.device) -> tuple[float, str] | None:
    """Return a known GPU's operations a second in bf16 and its name; None for other devices."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, teraflops in PEAK_TFLOPS.items():
        if all(word in name for word in part.split()):
            return 1e12 * teraflops, part
    return None
