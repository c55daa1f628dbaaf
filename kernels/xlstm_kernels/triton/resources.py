"""What the compiled kernels need, measured without a GPU: `python -m xlstm_kernels.triton.resources --dims 64 128`.

The real launches of every operator are compiled for a target instead of being started; registers and spills are
those that the assembler reports, shared memory is Triton's. Must not run under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
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

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


class Resources(NamedTuple):
    """Of one kernel: registers of a thread, bytes of it spilled, bytes of shared memory of a program."""

    registers: int
    spills: int
    shared: int


@contextmanager
def compiled_launches(arch: int) -> Iterator[dict[str, Resources]]:
    """Compile each launch inside the block for sm_<arch>; yields the table that the launches fill."""
    table: dict[str, Resources] = {}

    def compile_instead(
        self: JITFunction, *args: Any, grid: object, warmup: bool, **kwargs: Any
    ) -> None:
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        table[self.fn.__name__] = compile_kernel(self, values, arch)

    launch, JITFunction.run = JITFunction.run, compile_instead
    try:
        yield table
    finally:
        JITFunction.run = launch


def compile_kernel(kernel: JITFunction, values: dict[str, Any], arch: int) -> Resources:
    """Compile one kernel with the specialisation its arguments would get: pointers and sizes divisible by 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], list] = {}
    for at, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name], aligned[at,] = (
                POINTERS[value.dtype],
                [["tt.divisibility", 16]],
            )
        elif (
            parameter.is_constexpr or value is None or value == 1
        ):  # Triton compiles an argument of 1 in
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                aligned[at,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {name: values[name] for name in OPTIONS if name in values}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = assemble(built.asm["ptx"], arch)
    return Resources(registers, spills, built.metadata.shared)


def assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Return registers and spilled bytes from the verbose output of Triton's own ptxas."""
    ptxas = get_ptxas(arch).path
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target}", str(source), "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stores, loads = (
        sum(map(int, re.findall(rf"(\d+) bytes spill {kind}", report)))
        for kind in ("stores", "loads")
    )
    return max(map(int, re.findall(r"Used (\d+) registers", report))), max(stores, loads)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a tensor that has a shape and a gradient, but no memory."""
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)


def launch_mlstm(dim: int, dtype: torch.dtype) -> None:
    """Launch the chunkwise mLSTM, forward and backward: packed, four query heads to a value head."""
    from xlstm_kernels.triton.mlstm import mlstm_triton

    q, k, v = (leaf(1, heads, 256, dim, dtype=dtype) for heads in (4, 4, 1))
    i, f = leaf(1, 4, 256), leaf(1, 4, 256)
    ids = torch.empty(1, 256, dtype=torch.int64, device="meta")
    mlstm_triton(q, k, v, i, f, ids, None)[0].sum().backward()


def launch_steps(dim: int, dtype: torch.dtype) -> None:
    """Launch the mLSTM step and the hybrid step, window 512 and 4 sinks."""
    from xlstm_kernels.triton.step import hybrid_step_triton, mlstm_step_triton

    q, k, v = (leaf(1, heads, dim, dtype=dtype) for heads in (4, 4, 1))
    i, f, gate = leaf(1, 4), leaf(1, 4), leaf(1, 4)
    state = MLSTMState.zeros(1, 4, dim, dim, device="meta")
    mlstm_step_triton(q, k, v, i, f, state)
    ring = Ring.empty(1, 1, dim, dim, window=512, sinks=4, dtype=dtype, device="meta")
    hybrid_step_triton(q, v, v, q, k, i, f, gate, state, ring, 4, 1.0)


def launch_window(dim: int, dtype: torch.dtype) -> None:
    """Launch sliding-window attention, forward and backward: packed, four query heads to a key head, window 512."""
    from xlstm_kernels.triton.window import window_triton

    q, k, v = (leaf(1, heads, 1024, dim, dtype=dtype) for heads in (4, 1, 1))
    ids = torch.empty(1, 1024, dtype=torch.int64, device="meta")
    window_triton(q, k, v, 512, 4, ids, 1.0).sum().backward()


OPERATORS: tuple[Callable[[int, torch.dtype], None], ...] = (
    launch_mlstm,
    launch_steps,
    launch_window,
)


def measure(archs: list[int], dims: list[int], dtype: torch.dtype) -> dict[str, Resources]:
    """Compile every kernel; keys are "kernel sm_<arch> D=<dim>"."""
    table: dict[str, Resources] = {}
    for arch in archs:
        for dim in dims:
            with compiled_launches(arch) as found:
                for launch in OPERATORS:
                    launch(dim, dtype)
            table |= {f"{name} sm_{arch} D={dim}": resources for name, resources in found.items()}
    return table


def main() -> None:
    """Print the table as JSON, or as lines."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_kernels.triton.resources", description=__doc__.splitlines()[0]
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
    options = parser.parse_args()
    table = measure(
        options.archs, options.dims, torch.float32 if options.float32 else torch.bfloat16
    )
    if options.json:
        sys.stdout.write(
            json.dumps({name: list(resources) for name, resources in table.items()}) + "\n"
        )
        return
    for name, (registers, spills, shared) in table.items():
        sys.stdout.write(
            f"{name:40} {registers:4} registers {spills:6} B spilled {shared:7} B shared\n"
        )


if __name__ == "__main__":
    main()
