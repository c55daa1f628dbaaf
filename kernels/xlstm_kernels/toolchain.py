"""The compiler behind the Triton kernels: its versions, and what is known to be wrong with them.

Nothing here imports Triton before it is asked about it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

Version = tuple[int, ...]

# ptxas 12.8 and 13.0 make wrong code of correct kernels on Hopper (flash-linear-attention issue
# 1262), and up to 13.2 it overwrites registers that a product in flight still reads (triton issues
# 11781, 11854).
SOUND_PTXAS: Version = (13, 3)
HOPPER = 9  # major compute capability
CUDA_HOMES = ("/usr/local/cuda/bin/ptxas", "/opt/cuda/bin/ptxas")


class Assembler(NamedTuple):
    """The ptxas that Triton calls: where it is, and its version, such as 13.3.27."""

    path: str
    version: str


def numbers(version: str) -> Version:
    """Read the leading numbers of a version: (3, 7, 1) of 3.7.1+cu130."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def triton_version() -> str | None:
    """Return the version of the installed Triton; None without one, or where it is broken."""
    return None if triton_fault() else str(importlib.import_module("triton").__version__)


def triton_fault() -> str | None:
    """Say why Triton cannot be used; None if it can be imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module("triton")
    except Exception as error:  # its libraries raise whatever they like
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    return None


@functools.cache  # it starts a process
def assembler(capability: int) -> Assembler | None:
    """Return the ptxas that Triton calls for a compute capability, such as 90; None without one."""
    if triton_version() is None:
        return None
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        # Triton 3.6 to 3.9 give a tool with a path, and raise where they find none.
        path = str(get_ptxas(capability).path)
    except Exception:  # the self-check finds out what this means
        return None
    version = ptxas_version(path)
    return None if version is None else Assembler(path, version)


def ptxas_version(path: str) -> str | None:
    """Ask a ptxas for its version; None if it does not run."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"V(\d+\.\d+\.\d+)", said.stdout)
    return found[1] if found else None


def sounder_assembler() -> Assembler | None:
    """Return a ptxas on this machine without the known faults, if there is one."""
    for path in filter(None, (shutil.which("ptxas"), *CUDA_HOMES)):
        version = ptxas_version(path) if Path(path).is_file() else None
        if version is not None and numbers(version) >= SOUND_PTXAS:
            return Assembler(path, version)
    return None


def known_faults(capability: int, triton: str, ptxas: str) -> list[str]:
    """List what is known to be wrong with these versions on a device, and what to do.

    capability: of the device, such as 90. triton, ptxas: without a number where there is none.
    """
    faults: list[str] = []
    if not numbers(triton):
        return faults
    if not numbers(ptxas):
        faults.append("Triton finds no ptxas; set TRITON_PTXAS_PATH to one, such as that of CUDA")
    if capability // 10 != HOPPER:
        return faults
    if numbers(ptxas) and numbers(ptxas) < SOUND_PTXAS:
        needed = ".".join(map(str, SOUND_PTXAS))
        faults.append(
            f"ptxas {ptxas} can make wrong code of correct kernels on sm_{capability}; set "
            f"TRITON_PTXAS_PATH to a ptxas {needed} or newer (CUDA {needed}), or take Triton 3.9"
        )
    if numbers(triton) < (3, 8):
        # fla 640, 826, 983; triton 9433, 9514, 9530. Our kernels have neither (docs/kernels.md).
        faults.append(
            f"Triton {triton} makes wrong code of transposed products, and of products with "
            "operands in registers that run on in a pipelined loop; these kernels have neither, "
            "other libraries' may"
        )
    return faults
