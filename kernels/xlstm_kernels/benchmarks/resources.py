"""Measure what the compiled kernels need, without a GPU.

`python -m xlstm_kernels.benchmarks.resources --dims 64 128`

The real launches of every operator are compiled for a target instead of being started. Registers
and spills are those that the assembler reports; shared memory is what Triton reports. It must not
run under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from xlstm_kernels.state import MLSTMState, Ring
from xlstm_kernels.triton.configs import (
    MLSTMConfig,
    WindowConfig,
    mlstm_config,
    window_config,
)

# Triton's name of a pointer to each dtype.
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int32: "*i32", torch.int64: "*i64", torch.float64: "*fp64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")
# The walks over chunks, which are other kernels where a row has super-chunks; by the table's name.
WALKS = {
    "state_end_kernel": "state_end_kernel", "state_kernel": "state_kernel:joined",
    "state_grad_end_kernel": "state_grad_end_kernel",
    "state_grad_kernel": "state_grad_kernel:joined",
}  # fmt: skip


# KiB of shared memory that a program can have, by compute capability (CUDA's programming guide).
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


def most_shared(arch: int) -> int:
    """Return the bytes of shared memory that a program can have; unknown devices have the least."""
    return 1024 * SHARED.get(arch, min(SHARED.values()))


class Resources(NamedTuple):
    """What a kernel needs: registers and spilled bytes per thread, shared bytes per program.

    programs: that an SM holds at the same time; two or more hide each other's waits. in_flight: as
    `products_in_flight` counts them.
    """

    registers: int
    spills: int
    shared: int
    programs: int
    in_flight: int


# Of an SM (CUDA's programming guide): registers, warps, programs; a program's own KiB.
REGISTERS, MOST_WARPS, MOST_PROGRAMS, OWN_SHARED = 65536, 64, 32, 1


def programs_on_an_sm(arch: int, registers: int, shared: int, warps: int) -> int:
    """Return how many programs an SM holds at the same time."""
    each = -(-registers // 8) * 8 * 32 * warps  # registers are given to warps in eights a thread
    # A program can have all of an SM's shared memory but the KiB that each program takes itself.
    whole = most_shared(arch) + 1024 * OWN_SHARED
    by_shared = whole // (shared + 1024 * OWN_SHARED)
    return min(REGISTERS // each, by_shared, MOST_WARPS // warps, MOST_PROGRAMS)


@contextmanager
def compiled_launches(arch: int, kernels: tuple[str, ...] = ()) -> Iterator[dict[str, Resources]]:
    """Compile each launch inside the block for sm_<arch> instead of starting it.

    kernels: those to compile, all if empty. Yields the table that the launches fill: resources by
    the name of the kernel.
    """
    table: dict[str, Resources] = {}

    def compile_instead(
        self: JITFunction, *args: Any, grid: object, warmup: bool, **kwargs: Any
    ) -> None:
        if kernels and self.fn.__name__ not in kernels:
            return
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        table[self.fn.__name__] = compile_kernel(self, values, arch)

    launch, JITFunction.run = JITFunction.run, compile_instead
    try:
        yield table
    finally:
        JITFunction.run = launch


def compile_kernel(kernel: JITFunction, values: dict[str, Any], arch: int) -> Resources:
    """Compile one kernel as a launch with these arguments would.

    Triton specialises a kernel to its arguments: it compiles None and 1 in, and notes which
    pointers and integers are divisible by 16.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    divisible = [["tt.divisibility", 16]]
    for number, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            if not parameter.do_not_specialize:
                attributes[number,] = divisible
        elif parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif parameter.do_not_specialize:
            signature[name] = "i32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[number,] = divisible
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: values[name] for name in OPTIONS if name in values}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = assemble(built.asm["ptx"], arch)
    shared, warps = built.metadata.shared, built.metadata.num_warps
    programs = programs_on_an_sm(arch, registers, shared, warps)
    return Resources(registers, spills, shared, programs, products_in_flight(built.asm["ptx"]))


def products_in_flight(ptx: str) -> int:
    """Count products with operands in registers that go on after a wait or a branch, at a time.

    Up to 3.7, Triton may write over such operands too early (triton 9433, 9514, 9530). Only sm_90
    has products that run while the program goes on.
    """
    found = begun = 0
    groups: list[int] = []  # such products by group, those that still run
    for line in ptx.splitlines():
        if product := re.search(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*(\{?)", line):
            begun += bool(product[1])
        elif "wgmma.commit_group" in line:
            groups, begun = [*groups, begun], 0
        elif wait := re.search(r"wgmma\.wait_group\S*\s+(\d+)", line):
            groups = groups[max(0, len(groups) - int(wait[1])) :]
            found = max(found, sum(groups))
        elif re.search(r"\bbra\b|^\$L", line):
            found = max(found, sum(groups) + begun)
    return found


def assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Return registers and spilled bytes from the verbose output of Triton's own ptxas."""
    ptxas = get_ptxas(arch).path
    # From sm_90 on, Triton emits instructions of one architecture only, which carries an "a".
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target}", str(source), "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stores = sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))
    loads = sum(map(int, re.findall(r"(\d+) bytes spill loads", report)))
    return max(map(int, re.findall(r"Used (\d+) registers", report))), max(stores, loads)


def bare(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a tensor that has a shape, but no memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_mlstm(
    dim: int, dtype: torch.dtype, config: MLSTMConfig | None = None, cut: int = 1
) -> None:
    """Launch the chunkwise mLSTM, forward and backward.

    Rows are packed, and four query heads share a value head. cut: most super-chunks of a row.
    """
    from xlstm_kernels.triton.mlstm_passes import launch_backward, launch_forward

    q, k, v = (bare(1, heads, 256, dim, dtype=dtype) for heads in (4, 4, 1))
    i, f, runs = bare(1, 4, 256), bare(1, 4, 256), bare(1, 256, dtype=torch.int32)
    C0, n0, m0 = MLSTMState.zeros(1, 4, dim, dim, device="meta")
    settings = (config or mlstm_config(dtype, dim, dim)).numbers()
    # The functions behind the registered operators, which launch nothing on meta tensors.
    found = launch_forward(q, k, v, i, f, C0, n0, m0, runs, settings, True, False, cut)
    (h, C, n, _), kept = found[:4], list(found[4:])
    arguments = [q, k, v, i, f, C0, n0, m0]
    launch_backward([h, C, n], arguments, runs, kept, settings, True, True, cut)


def launch_steps(dim: int, dtype: torch.dtype, softcap: float | None = None) -> None:
    """Launch the mLSTM step and the hybrid step, window 512 and 4 sinks.

    softcap: bounds the scores; there are sink logits then too.
    """
    from xlstm_kernels.triton.step import hybrid_step_triton, mlstm_step_triton

    q, k, v = (bare(1, heads, dim, dtype=dtype) for heads in (4, 4, 1))
    i, f, gate = bare(1, 4), bare(1, 4), bare(1, 4)
    state = MLSTMState.zeros(1, 4, dim, dim, device="meta")
    mlstm_step_triton(q, k, v, i, f, state)
    ring = Ring.empty(1, 1, dim, dim, window=512, sinks=4, dtype=dtype, device="meta")
    hybrid_step_triton(
        q, v, v, q, k, i, f, gate, state, ring, None,
        sinks=4, scale=1.0, softcap=softcap, sink_logits=None if softcap is None else bare(4),
    )  # fmt: skip


def launch_window(
    dim: int,
    dtype: torch.dtype,
    config: WindowConfig | None = None,
    softcap: float | None = None,
) -> None:
    """Launch sliding-window attention, forward and backward; window 512 and 4 sinks.

    Rows are packed, and four query heads share a key head. softcap: as in `launch_steps`.
    """
    from xlstm_kernels.triton import window

    q, k, v = (bare(1, heads, 1024, dim, dtype=dtype) for heads in (4, 1, 1))
    runs, starts = (bare(1, 1024, dtype=torch.int32) for _ in range(2))
    logits = None if softcap is None else bare(4)
    # Window, sinks and scale before it.
    settings = (512, 4, 1.0, softcap or 0.0, list(config or window_config(dtype, dim)))
    out, logsumexp = window.launch_forward(q, k, v, runs, starts, logits, *settings)
    window.launch_backward(
        out, q, k, v, runs, starts, logits, out, logsumexp, *settings,
        queries=True, keys_and_values=True, logits=logits is not None,
    )  # fmt: skip


def measure(
    archs: list[int], dims: list[int], dtype: torch.dtype, softcap: float | None = None
) -> dict[str, Resources]:
    """Compile every kernel; keys are "kernel sm_<arch> D=<dim>".

    softcap: of the attention's alone, with bounded scores and sink logits.
    """
    table: dict[str, Resources] = {}
    operators: list[Callable[[int, torch.dtype], None]] = [launch_mlstm, launch_steps]
    operators.append(launch_window)
    if softcap is not None:
        attention = (launch_steps, launch_window)
        operators = [functools.partial(launch, softcap=softcap) for launch in attention]
    for arch in archs:
        for dim in dims:
            with compiled_launches(arch) as found:
                for launch in operators:
                    launch(dim, dtype)
            if softcap is None:
                with compiled_launches(arch, tuple(WALKS)) as cut:
                    launch_mlstm(dim, dtype, cut=2)
                found |= {WALKS[name]: resources for name, resources in cut.items()}
            table |= {f"{name} sm_{arch} D={dim}": resources for name, resources in found.items()}
    return table


def main() -> None:
    """Print the table as JSON, or as lines."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_kernels.benchmarks.resources", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--archs", type=int, nargs="+", default=[80, 90], help="compute capabilities; default 80 90"
    )
    parser.add_argument(
        "--dims", type=int, nargs="+", default=[64, 128], help="head dims; default 64 128"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--float32", action="store_true", help="inputs in float32 instead of bfloat16"
    )
    parser.add_argument(
        "--softcap", type=float, help="attention alone, with scores bounded by it and sink logits"
    )
    options = parser.parse_args()
    dtype = torch.float32 if options.float32 else torch.bfloat16
    table = measure(options.archs, options.dims, dtype, options.softcap)
    if options.json:
        sys.stdout.write(
            json.dumps({name: list(resources) for name, resources in table.items()}) + "\n"
        )
        return
    for name, (registers, spills, shared, programs, in_flight) in table.items():
        sys.stdout.write(
            f"{name:40} {registers:4} registers {spills:6} B spilled {shared:7} B shared "
            f"{programs:3} programs on an SM {in_flight:3} products that run on\n"
        )


if __name__ == "__main__":
    main()
