"""Time the operators and their peers.

`python -m xlstm_kernels.benchmarks.operators --tokens 256 1024`

Each candidate is first checked against its float64 reference, outputs and gradients. One that fails
is not timed; one that cannot run is left out; one that raises is a row of its own. Rows are written
as they come, and `--budget-s` ends the benchmark in time with what there is. The share of the
roofline is the least time that the call's operations and bytes need, divided by its time; the rates
behind it are those of a large product and a large copy in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from xlstm_kernels.benchmarks.checking import BOUNDS, Checker
from xlstm_kernels.benchmarks.entries import ENTRIES, Entry, Inputs, Prepared, Shape, draw, work
from xlstm_kernels.benchmarks.native import NATIVE
from xlstm_kernels.benchmarks.report import Journal, Row, write_report
from xlstm_kernels.benchmarks.timing import (
    Rates,
    cache_size,
    measure_rates,
    milliseconds,
    rotated,
)
from xlstm_kernels.testing import device_is_broken

ALL_ENTRIES = (*ENTRIES, *NATIVE)


class OutOfTime(BaseException):
    """The budget is spent. No Exception: an entry that is being timed must not catch it."""


@contextlib.contextmanager
def alarm(seconds: float | None) -> Iterator[None]:
    """Raise OutOfTime in this block after so many seconds, also in the middle of an entry."""

    def ring(*_: object) -> None:
        raise OutOfTime

    # Only the main thread gets signals.
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """Checks and times entries on one device."""

    def __init__(self, options: argparse.Namespace, rates: Rates) -> None:
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.bound, self.repeats, self.rates = BOUNDS[options.dtype], options.repeats, rates
        self.checker = Checker(self.device, self.dtype)

    def rows(self, entry: Entry, inputs: Inputs, shape: Shape) -> list[Row]:
        """Return an entry's rows: its times, or the one that says why there are none."""
        row = Row(
            entry.operator, entry.backend, "", shape.tokens, batch=shape.batch, heads=shape.heads
        )
        try:
            if reason := entry.skipped(shape, inputs):
                return [row._replace(status="left out", reason=reason)]
            error = None if entry.prepare else self.checker.worst_ratio(entry, shape)
            if error is not None and not error < self.bound:  # a NaN fails too
                found = f"RMS ratio {error:.1e} to the reference; allowed: {self.bound:.0e}"
                return [row._replace(status="wrong", reason=found, error=error)]
            return [timed._replace(error=error) for timed in self.times(entry, inputs, shape, row)]
        except Exception as error:  # another library's kernels raise whatever they like
            first = (str(error).strip().splitlines() or [""])[0][:200]
            return [row._replace(status="failed", reason=f"{type(error).__name__}: {first}")]

    def times(self, entry: Entry, inputs: Inputs, shape: Shape, row: Row) -> Iterator[Row]:
        """Yield the times forward, and forward with backward where there are gradients."""
        leaves, call, turns = self.prepared(entry, inputs, shape)

        def forward() -> None:
            with torch.no_grad():
                call()

        def both() -> None:
            h = call()
            torch.autograd.grad(h, leaves, torch.ones_like(h))

        passes = (("forward", forward), ("forward + backward", both))[: 2 if leaves else 1]
        for name, run in passes:
            graph = entry.operator.endswith("step")
            taken = milliseconds(run, self.repeats, self.device, graph=graph) / turns
            size_each = inputs.x["q"].element_size()
            operations, size = work(entry, shape, size_each, backward=run is both)
            least = 1e3 * max(operations / self.rates.operations, size / self.rates.bytes)
            yield row._replace(
                passes=name, milliseconds=taken, teraflops=operations / taken / 1e9,
                gigabytes=size / taken / 1e6, roofline=least / taken,
            )  # fmt: skip

    def prepared(
        self, entry: Entry, inputs: Inputs, shape: Shape
    ) -> tuple[list[Tensor], Callable[[], Tensor], int]:
        """Return the leaves, the call, and how many times the call runs the operator."""
        if entry.prepare is not None:
            made: Prepared = entry.prepare(inputs, shape)
            return *made, 1
        run = entry.run
        assert run is not None
        leaves = [inputs.x[name] for name in entry.reads]
        if leaves:
            return leaves, lambda: run(inputs, shape), 1
        copies = rotated(inputs, cache_size(self.device))
        return leaves, lambda: [run(copy, shape) for copy in copies][-1], len(copies)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_kernels.benchmarks.operators", description=__doc__.splitlines()[0]
    )
    numbers = {
        "groups": 2, "key-dim": 32, "value-dim": 32,
        "window": 32, "sinks": 4, "document": 0, "repeats": 11, "threads": 1,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[256], help="lengths of a row; default 256"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[32], help="rows; default 32")
    parser.add_argument(
        "--heads", type=int, nargs="+", default=[4],
        help="query heads; --groups belongs to the first number, and grows with it; default 4",
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default {device}")
    parser.add_argument(
        "--dtype", choices=BOUNDS, default="float32", help="of q, k, v; default float32"
    )
    operators = sorted({entry.operator for entry in ALL_ENTRIES})
    parser.add_argument("--operators", nargs="+", choices=operators, help="default all")
    parser.add_argument(
        "--report", type=Path,
        help="folder for rows.jsonl (as they come; what is there is not timed again), kernels.md, "
        "kernels.json and kernels.svg",
    )  # fmt: skip
    parser.add_argument(
        "--budget-s", type=float, help="seconds after which to stop, with what there is"
    )
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.budget_s is not None and options.ends is None:
        options.ends = time.time() + options.budget_s
    return options


def shapes_of(options: argparse.Namespace) -> Iterator[Shape]:
    """Yield the shapes that are timed."""
    shared = options.heads[0] // options.groups  # query heads of a value head
    names = ("key_dim", "value_dim", "window", "sinks", "document")
    rest = [getattr(options, name) for name in names]
    for tokens, batch, heads in itertools.product(options.tokens, options.batch, options.heads):
        yield Shape(batch, tokens, heads, heads // shared, *rest)


def main(arguments: list[str] | None = None) -> int:
    """Check and time every entry; returns the exit status, 1 if an entry is wrong or fails."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    journal = Journal(options.report)
    device = torch.device(options.device)
    rates = measure_rates(device, getattr(torch, options.dtype), options.repeats)
    product, copy = rates.operations / 1e12, rates.bytes / 1e9
    say(f"{device}: product {product:.2f} TFLOP/s, copy {copy:.1f} GB/s, {options.dtype}")
    try:
        left = None if options.ends is None else options.ends - time.time()
        with alarm(left):
            run_all(options, journal, Bench(options, rates))
    except OutOfTime:
        say("Stopped: the time of --budget-s is up.")
    if options.report:
        machine = {"device": str(device), "dtype": options.dtype, **rates._asdict()}
        write_report(options.report, journal.rows, machine, vars(options))
    return int(any(row.status in ("wrong", "failed") for row in journal.rows))


def run_all(options: argparse.Namespace, journal: Journal, bench: Bench) -> None:
    """Check and time every entry at every shape; rows go to the journal as they come."""
    for shape in shapes_of(options):
        inputs = None
        for entry in ALL_ENTRIES:
            if options.operators and entry.operator not in options.operators:
                continue
            if journal.done(entry.operator, entry.backend, shape.batch, shape.heads, shape.tokens):
                continue
            inputs = inputs or draw(shape, bench.device, bench.dtype)
            for row in bench.rows(entry, inputs, shape):
                journal.add(row)
                say(row.text())
            if journal.rows[-1].status == "failed":
                go_on_after_failure(bench.device, options)


def go_on_after_failure(device: torch.device, options: argparse.Namespace) -> None:
    """Free what a failed entry holds; start this program anew if it broke the device's context."""
    if device.type != "cuda":
        return
    with contextlib.suppress(RuntimeError):  # of a broken device
        torch.cuda.empty_cache()
    if not device_is_broken(device):
        return
    # After an illegal access, nothing runs in this process any more. Without a journal, the next
    # one would run into it again.
    if options.report is None:
        raise RuntimeError("a kernel's illegal access broke the device for this process")
    ends = [] if options.ends is None else ["--ends", str(options.ends)]
    again = [sys.executable, "-m", "xlstm_kernels.benchmarks.operators", *sys.argv[1:], *ends]
    os.execv(sys.executable, again)


def say(line: str) -> None:
    """Write a line of the table."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
