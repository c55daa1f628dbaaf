"""What the last bit of a sum depends on, besides the numbers: processor, threads, torch's version.

Another of these adds in another order, or with other instructions. The result is then right, and
differs in the last bits (docs/training.md).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

Arithmetic = dict[str, str | int]
"""What a process computes with: versions (`torch`, `transformers`, ...); on a CPU its `threads`,
`processor` and `instructions` (AVX2, AVX512, ...), on a GPU `gpu` and `cuda` (or `rocm`)."""


def arithmetic(device: torch.device | None = None) -> Arithmetic:
    """Return what this process computes with on a device (default: the accelerator, if any)."""
    if device is None:
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        device = found or torch.device("cpu")
    facts: Arithmetic = {"torch": str(torch.__version__), **_versions()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        kind = "cuda" if torch.version.cuda else "rocm"
        facts[kind] = str(torch.version.cuda or torch.version.hip)
        return facts
    if device.type != "cpu":
        return facts | {"device": device.type}
    return facts | {
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    """Versions of what adds numbers besides torch: this package, the model code and Triton."""
    found = {}
    for package in ("xlstm-distill", "transformers", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def differences(
    before: Sequence[Mapping[str, str | int]], now: Sequence[Mapping[str, str | int]]
) -> list[str]:
    """Name what differs between two sets of ranks, each change once: `threads 2 -> 1`."""
    found: list[str] = []
    for earlier, later in zip(before, now, strict=False):
        # A rank that went from a CPU to a GPU has other facts, not only other values.
        for key in dict.fromkeys((*earlier, *later)):
            old, new = earlier.get(key, "none"), later.get(key, "none")
            if old != new:
                found.append(f"{key} {old} -> {new}")
    return list(dict.fromkeys(found))


@functools.cache  # reading it costs a millisecond; a run asks for every artifact
def processor() -> str:
    """Return the processor's model name, or its architecture where the system does not tell."""
    table = Path("/proc/cpuinfo")
    # platform.processor() is empty on most Linux systems.
    lines = table.read_text(errors="replace").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine()
