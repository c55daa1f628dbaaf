"""Facts of the device a process computes on: memory it has held, and what it could compute."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362}
"""Published dense bf16 rate of GPUs, by words of the device's name, first match counts."""


def peak_bytes(device: torch.device) -> int:
    """Highest memory of this process so far: allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # a process's ru_maxrss starts at its parent's size on Linux, this does not
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def forget_peak() -> None:
    """Let `peak_bytes` begin anew at what is held now. Where the system cannot (macOS), it goes on from before."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def published_peak(device: torch.device) -> tuple[float, str] | None:
    """Operations a second of a known GPU in bf16, and the name it is known by; None for every other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, teraflops in PEAK_TFLOPS.items():
        if all(word in name for word in part.split()):
            return 1e12 * teraflops, part
    return None
