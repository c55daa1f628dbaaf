"""Every kernel compiles for sm_80 and sm_90 within its recorded resources; needs no GPU.

`limits.json` holds what `python -m xlstm_kernels.benchmarks.resources --json` printed, and with
which Triton. One target is in the quick suite, the others take a minute each on a slow machine.
"""

from __future__ import annotations

import functools
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
    "chunk_kernel",
    "centre_kernel",
    "state_kernel",
    "state_kernel:joined",
    "state_end_kernel",
    "state_grad_kernel:joined",
    "state_grad_end_kernel",
    "output_kernel",
    "step_kernel",
    "hybrid_step_kernel",
    "window_kernel",
}

RECORDED_VERSION = pytest.mark.skipif(
    triton.__version__ != RECORDED["triton"],
    reason=f"limits are those of triton {RECORDED['triton']}",
)
# Architectures and head dims; one of them in the quick suite.
QUICK = (90, 128)
SLOW = [(80, 64), (80, 128), (90, 64)]
TARGETS = [QUICK, *(pytest.param(target, marks=pytest.mark.slow) for target in SLOW)]

Table = dict[str, list[int]]


@functools.cache
def compile_for(arch: int, *options: str) -> Table:
    """Compile in a process of its own: this one interprets kernels instead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "xlstm_kernels.benchmarks.resources", "--json"]
    command += ["--archs", str(arch), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def over_the_limits(found: Table, limits: Table) -> dict[str, dict[str, list[int]]]:
    over = {}
    for name, values in found.items():
        (*needs, programs, running), (*most, fewest, _) = values, limits[name]
        more = any(value > limit for value, limit in zip(needs, most, strict=True))
        if more or programs < fewest or running:
            over[name] = {"found": values, "limit": limits[name]}
    return over


@pytest.mark.parametrize("target", TARGETS)
class TestTarget:
    @pytest.fixture
    def compiled(self, target: tuple[int, int]) -> Table:
        arch, dim = target
        return compile_for(arch, "--dims", str(dim))

    def test_every_kernel_is_recorded(self, compiled: Table, target: tuple[int, int]) -> None:
        name = f"sm_{target[0]} D={target[1]}"
        assert compiled.keys() == {key for key in RECORDED["kernels"] if key.endswith(name)}

    @RECORDED_VERSION
    def test_forward_walk_and_step_kernels_spill_nothing(self, compiled: Table) -> None:
        spills = {name.split()[0]: spilled for name, (_, spilled, *_) in compiled.items()}
        found = {name: spilled for name, spilled in spills.items() if name in NEVER_SPILL}
        assert found == dict.fromkeys(NEVER_SPILL, 0)

    def test_shared_memory_fits_the_device(self, compiled: Table) -> None:
        limits = {name: SHARED[name.split()[1]] for name in compiled}
        over = {name: found for name, (_, _, found, *_) in compiled.items() if found > limits[name]}
        assert not over

    @RECORDED_VERSION
    def test_resources_stay_within_the_recorded_limits(self, compiled: Table) -> None:
        assert not over_the_limits(compiled, RECORDED["kernels"])

    # Whatever the version: up to 3.7, Triton may overwrite what such products read (triton 9433,
    # 9514, 9530).
    def test_no_product_with_operands_in_registers_runs_on(self, compiled: Table) -> None:
        assert [name for name, (*_, running) in compiled.items() if running] == []


def test_products_that_run_on_are_counted() -> None:
    from xlstm_kernels.benchmarks.resources import products_in_flight

    begin = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2}, "
    registers, memory = begin + "{%r1, %r2}, %rd1, p, 1, 1, 0;", begin + "%rd2, %rd1, p, 1, 1, 0;"
    commit, wait = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned {};".format
    programs = (
        ([registers, registers, commit, wait(0), "@%p1 bra $L__BB0_1;"], 0),
        ([memory, commit, wait(1), "@%p1 bra $L__BB0_1;"], 0),
        ([registers, commit, memory, commit, wait(1)], 0),
        ([registers, commit, memory, commit, wait(2)], 1),
        ([registers, registers, commit, "@%p1 bra $L__BB0_1;", wait(0)], 2),
        ([registers, "$L__BB0_2:", commit, wait(0)], 1),
    )
    for lines, running in programs:
        assert products_in_flight("\n".join(lines)) == running, lines


def test_the_targets_are_those_recorded() -> None:
    names = {name.partition(" ")[2] for name in RECORDED["kernels"]}
    assert names == {f"sm_{arch} D={dim}" for arch, dim in (QUICK, *SLOW)}


@pytest.mark.slow
@RECORDED_VERSION
def test_float32_stays_within_its_recorded_limits() -> None:
    compiled = compile_for(90, "--float32")
    assert compiled.keys() == RECORDED["float32"].keys()
    assert not over_the_limits(compiled, RECORDED["float32"])
