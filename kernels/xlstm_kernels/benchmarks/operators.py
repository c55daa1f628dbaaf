"""Time the operators and their peers.

`python -m xlstm_kernels.benchmarks.operators --tokens 256 1024`

Each candidate is first checked against its float64 reference, outputs and gradients. One that fails
is not timed; one that cannot run is left out, with the reason. The share of the roofline is the
least time that the call's operations and bytes need, divided by its time; the rates behind it are
those of a large product and a large copy in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.benchmarks.entries import ENTRIES, Entry, Inputs, Shape, draw, work
from xlstm_kernels.benchmarks.report import Row, write_report
from xlstm_kernels.testing import error_ratio, outputs_and_grads

# RMS ratio of outputs and gradients to the float64 reference. In low dtypes it is the rounding of
# outputs and gradients, and that of the operands of products.
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
CHECKED_TOKENS, CHECKED_DOCUMENT = 300, 100  # tokens of the check; mean length of its documents


class Rates(NamedTuple):
    """What this device reaches: operations/s of a large product, bytes/s of a large copy."""

    operations: float
    bytes: float


def checked_shapes(entry: Entry, shape: Shape) -> list[Shape]:
    """Return the shapes at which an entry is checked.

    One row with tokens beyond window and sinks: as one document and, if the entry takes them, as
    packed documents.
    """
    reach = 0 if entry.operator == "mlstm" else 2 * (shape.window + shape.sinks)
    small = shape._replace(batch=1, tokens=min(shape.tokens, max(CHECKED_TOKENS, reach + 65)))
    if entry.operator.endswith("step"):
        return [small]
    return [small._replace(document=n) for n in (0, CHECKED_DOCUMENT)[: 1 + entry.packs]]


def worst_ratio(entry: Entry, shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest RMS ratio of an entry to its reference over all checked shapes."""
    shapes = checked_shapes(entry, shape)
    return max(ratio_at(entry, draw(small, device, dtype), small) for small in shapes)


def ratio_at(entry: Entry, inputs: Inputs, shape: Shape) -> float:
    """Return the largest RMS ratio of outputs and gradients at one shape."""
    actual = results_of(entry, entry.run, inputs.copied(), shape)
    expected = results_of(entry, entry.reference, inputs.copied(torch.float64), shape)
    return max(error_ratio(actual[name], expected[name]) for name in expected)


def results_of(
    entry: Entry, operator: Callable[[Inputs, Shape], Tensor], inputs: Inputs, shape: Shape
) -> dict[str, Tensor]:
    """Return h and the gradients of the inputs that the entry reads; of decoding only h."""
    if not entry.reads:
        return {"h": operator(inputs, shape)}
    leaves = {name: inputs.x[name] for name in entry.reads}
    return outputs_and_grads(lambda **x: operator(inputs._replace(x=inputs.x | x), shape), leaves)


def milliseconds(
    run: Callable[[], object], repeats: int, device: torch.device, graph: bool = False
) -> float:
    """Return the median time of a call, after two calls that do not count.

    On CUDA this is Triton's timer: events, with the L2 cache cleared before each call. With
    `graph`, many calls are replayed from a CUDA graph, as a server decodes: that leaves out the
    launch from Python, and the cache stays as it is.
    """
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        timer = do_bench_cudagraph if graph else do_bench
        return float(timer(run, return_mode="median"))
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def measure_rates(device: torch.device, dtype: torch.dtype, repeats: int) -> Rates:
    """Measure a product of two n x n matrices and a copy of 1 GiB (256 and 16 MiB on a CPU)."""
    on_gpu = device.type == "cuda"
    n, size = (8192, 2**30) if on_gpu else (256, 2**24)
    a = torch.randn(n, n, device=device).to(dtype)
    product = milliseconds(lambda: a @ a, repeats, device)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), repeats, device)
    return Rates(2e3 * n**3 / product, 2e3 * size / copy)


def time_entry(entry: Entry, inputs: Inputs, shape: Shape, repeats: int, rates: Rates) -> list[Row]:
    """Time an entry forward, and forward with backward where it has gradients."""
    device, bytes_each = inputs.x["q"].device, inputs.x["q"].element_size()
    leaves = [inputs.x[name] for name in entry.reads]

    def forward() -> None:
        with torch.no_grad():
            entry.run(inputs, shape)

    def both() -> None:
        h = entry.run(inputs, shape)
        torch.autograd.grad(h, leaves, torch.ones_like(h))

    rows = []
    for passes, call in (("forward", forward), ("forward + backward", both))[: 2 if leaves else 1]:
        taken = milliseconds(call, repeats, device, graph=entry.operator.endswith("step"))
        operations, size = work(entry, shape, bytes_each, backward=call is both)
        least = 1e3 * max(operations / rates.operations, size / rates.bytes)
        rates_found = (operations / taken / 1e9, size / taken / 1e6, least / taken)
        rows.append(Row(entry.operator, entry.backend, passes, shape.tokens, taken, *rates_found))
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_kernels.benchmarks.operators", description=__doc__.splitlines()[0]
    )
    numbers = {
        "batch": 32, "heads": 4, "groups": 2, "key-dim": 32, "value-dim": 32,
        "window": 32, "sinks": 4, "document": 0, "repeats": 11, "threads": 1,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[256], help="lengths of a row; default 256"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default {device}")
    parser.add_argument(
        "--dtype", choices=BOUNDS, default="float32", help="of q, k, v; default float32"
    )
    operators = sorted({entry.operator for entry in ENTRIES})
    parser.add_argument("--operators", nargs="+", choices=operators, help="default all")
    parser.add_argument(
        "--report", type=Path, help="folder for kernels.md, kernels.json and kernels.svg"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Check and time every entry; returns the exit status, 1 if an entry fails its check."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    bound = BOUNDS[options.dtype]
    rates = measure_rates(device, dtype, options.repeats)
    product, copy = rates.operations / 1e12, rates.bytes / 1e9
    say(f"{device}: product {product:.2f} TFLOP/s, copy {copy:.1f} GB/s, {options.dtype}")
    names = ("heads", "groups", "key_dim", "value_dim", "window", "sinks", "document")
    rest = [getattr(options, name) for name in names]
    failed, rows = False, []
    # The check does not depend on the number of tokens that is timed: one for all lengths.
    checked: dict[tuple, float] = {}
    for tokens in options.tokens:
        shape = Shape(options.batch, tokens, *rest)
        inputs = draw(shape, device, dtype)
        for entry in ENTRIES:
            if options.operators and entry.operator not in options.operators:
                continue
            label = f"{entry.operator:12} {entry.backend:26} T={tokens:<7}"
            if reason := entry.skipped(shape, inputs):
                say(f"{label} left out: {reason}")
                continue
            key = (entry, *checked_shapes(entry, shape))
            if key not in checked:
                checked[key] = worst_ratio(entry, shape, device, dtype)
            ratio = checked[key]
            if not ratio < bound:  # a NaN fails too
                failed = True
                found = f"RMS ratio {ratio:.1e} to the reference; allowed: {bound:.0e}"
                say(f"{label} not timed: {found}")
                continue
            for row in time_entry(entry, inputs, shape, options.repeats, rates):
                rows.append(row)
                say(f"{label} {row.text()}")
    if options.report:
        machine = {"device": str(device), "dtype": options.dtype, **rates._asdict()}
        write_report(options.report, rows, machine, vars(options))
    return int(failed)


def say(line: str) -> None:
    """Write a line of the table."""
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
