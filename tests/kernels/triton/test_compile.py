"""Every kernel compiles for sm_80 and sm_90 and stays within its recorded registers, spills and shared memory; no GPU.

`limits.json` holds what `python -m xlstm_kernels.triton.resources --json` printed, and with which Triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

RECORDED = json.loads((Path(__file__).parent / "limits.json").read_text())
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes that a program can have
NEVER_SPILL = {
    "gate_kernel",
    "state_kernel",
    "output_kernel",
    "step_kernel",
    "hybrid_step_kernel",
    "window_kernel",
}

RECORDED_VERSION = pytest.mark.skipif(
    triton.__version__ != RECORDED["triton"],
    reason=f"limits are those of triton {RECORDED['triton']}",
)

Table = dict[str, list[int]]


def compile_all(*options: str) -> Table:
    """Compile in a process of its own: this one interprets kernels instead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "xlstm_kernels.triton.resources", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def over_the_limits(found: Table, limits: Table) -> dict[str, dict[str, list[int]]]:
    return {
        name: {"found": values, "limit": limits[name]}
        for name, values in found.items()
        if any(value > limit for value, limit in zip(values, limits[name], strict=True))
    }


@pytest.fixture(scope="module")
def compiled() -> Table:
    return compile_all()


def test_every_kernel_is_recorded(compiled: Table) -> None:
    assert compiled.keys() == RECORDED["kernels"].keys()


@RECORDED_VERSION
def test_forward_and_step_kernels_spill_nothing(compiled: Table) -> None:
    found = {
        name: spills for name, (_, spills, _) in compiled.items() if name.split()[0] in NEVER_SPILL
    }
    assert len(found) == 4 * len(NEVER_SPILL)
    assert not any(found.values()), found


def test_shared_memory_fits_the_device(compiled: Table) -> None:
    over = {
        name: shared
        for name, (_, _, shared) in compiled.items()
        if shared > SHARED[name.split()[1]]
    }
    assert not over


@RECORDED_VERSION
def test_resources_stay_within_the_recorded_limits(compiled: Table) -> None:
    assert not over_the_limits(compiled, RECORDED["kernels"])


@RECORDED_VERSION
def test_float32_stays_within_its_recorded_limits() -> None:
    compiled = compile_all("--float32", "--archs", "90")
    assert compiled.keys() == RECORDED["float32"].keys()
    assert not over_the_limits(compiled, RECORDED["float32"])
