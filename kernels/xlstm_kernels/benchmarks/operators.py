"""Time the operators and their peers.

`python -m xlstm_kernels.benchmarks.operators --tokens 256 1024`

Each candidate is first checked against its float64 reference: forward the outputs, backward the
gradients too. One that fails is not timed; one that cannot run is left out; one that raises is a
row of its own. Rows are written as they come, and `--budget-s` ends the benchmark in time with what
there is. Started again with the same `--report`, it times what is missing there. It ends with 0, or
10 if entries are wrong or failed, or 11 if the budget stopped it. The share of the roofline is the
least time that the call's operations and bytes need, divided by its time; the rates behind it are
those of a large product and a large copy in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from xlstm_kernels.benchmarks.checking import BOUNDS, Checker
from xlstm_kernels.benchmarks.entries import ENTRIES, Entry, Inputs, Prepared, Shape, draw, work
from xlstm_kernels.benchmarks.native import NATIVE
from xlstm_kernels.benchmarks.parts import DONE, UNFINISHED, WITH_FAILURES, seconds
from xlstm_kernels.benchmarks.report import BOTH, FORWARD, Call, Journal, Row, write_report
from xlstm_kernels.benchmarks.timing import (
    OutOfTime,
    Rates,
    alarm,
    cache_size,
    measure_rates,
    milliseconds,
    rotated,
)
from xlstm_kernels.testing import device_is_broken

ALL_ENTRIES = (*ENTRIES, *NATIVE)


class Bench:
    """Checks and times entries on one device."""

    def __init__(self, options: argparse.Namespace, rates: Rates) -> None:
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.bound, self.repeats, self.rates = BOUNDS[options.dtype], options.repeats, rates
        self.checker = Checker(self.device, self.dtype)

    def rows(
        self, entry: Entry, inputs: Inputs, shape: Shape, passes: tuple[str, ...]
    ) -> Iterator[Row]:
        """Yield a row for each of these passes as it is timed, or the one that says why it is not.

        A backward pass that raises or is wrong leaves the forward pass as it is.
        """
        row = Row(
            entry.operator, entry.backend, "", shape.tokens, batch=shape.batch, heads=shape.heads
        )
        for name in passes:
            try:
                found = self.row(entry, inputs, shape, row._replace(passes=name))
            except Exception as error:  # another library's kernels raise whatever they like
                first = (str(error).strip().splitlines() or [""])[0][:200]
                reason = f"{type(error).__name__}: {first}"
                found = row._replace(passes=name, status="failed", reason=reason)
            if found.status != "timed":
                # Without a forward pass there is no backward pass.
                yield found._replace(passes="" if name == FORWARD else name)
                return
            yield found

    def row(self, entry: Entry, inputs: Inputs, shape: Shape, row: Row) -> Row:
        """Check and time the passes that a row names."""
        if reason := entry.skipped(shape, inputs):
            return row._replace(status="left out", reason=reason)
        backward, error = row.passes == BOTH, None
        if entry.prepare is None:
            error = self.checker.worst_ratio(entry, shape, backward)
            if not error < self.bound:  # a NaN fails too
                found = f"RMS ratio {error:.1e} to the reference; allowed: {self.bound:.0e}"
                return row._replace(status="wrong", reason=found, error=error)
        leaves, call, turns = self.prepared(entry, inputs, shape)

        def forward() -> None:
            with torch.no_grad():
                call()

        def both() -> None:
            h = call()
            torch.autograd.grad(h, leaves, torch.ones_like(h))

        graph = entry.operator.endswith("step")
        run = both if backward else forward
        taken = milliseconds(run, self.repeats, self.device, graph=graph) / turns
        operations, size = work(entry, shape, inputs.x["q"].element_size(), backward)
        least = 1e3 * max(operations / self.rates.operations, size / self.rates.bytes)
        return row._replace(
            milliseconds=taken, teraflops=operations / taken / 1e9, error=error,
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
        help="folder for rows.jsonl (as they come; what is timed there stays), kernels.md, "
        "kernels.json and kernels.svg",
    )  # fmt: skip
    parser.add_argument(
        "--budget-s", type=seconds, help="seconds after which to stop, with what there is"
    )
    # Of a program that starts itself anew: its end, and how many rows earlier starts left.
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=int, help=argparse.SUPPRESS)
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
    """Check and time every entry; returns the exit status (`benchmarks.parts`)."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    journal = Journal(options.report, options.since)
    status = DONE
    device = torch.device(options.device)
    rates = measure_rates(device, getattr(torch, options.dtype), options.repeats)
    product, copy = rates.operations / 1e12, rates.bytes / 1e9
    say(f"{device}: product {product:.2f} TFLOP/s, copy {copy:.1f} GB/s, {options.dtype}")
    try:
        left = None if options.ends is None else options.ends - time.time()
        with alarm(left):
            run_all(options, journal, Bench(options, rates))
        if any(row.status in ("wrong", "failed") for row in journal.rows):
            status = WITH_FAILURES
    except OutOfTime:
        say("Stopped: the time of --budget-s is up.")
        status = UNFINISHED
    if options.report:
        machine = {"device": str(device), "dtype": options.dtype, **rates._asdict()}
        write_report(options.report, journal.rows, machine, vars(options))
    return status


def run_all(options: argparse.Namespace, journal: Journal, bench: Bench) -> None:
    """Check and time every entry at every shape; rows go to the journal as they come.

    What failed, or was stopped, at an earlier start comes last: it may do so again.
    """
    chosen = [e for e in ALL_ENTRIES if not options.operators or e.operator in options.operators]
    for failed_before in (False, True):
        for shape in shapes_of(options):
            inputs = None
            for entry in chosen:
                call = Call(entry.operator, entry.backend, shape.batch, shape.heads, shape.tokens)
                if journal.failed_before(call) != failed_before:
                    continue
                if journal.untried(call, entry.passes):
                    inputs = inputs or draw(shape, bench.device, bench.dtype)
                    run_entry(entry, inputs, shape, call, journal, bench)
                    if journal.rows[-1].status == "failed":
                        go_on_after_failure(bench.device, journal, options)


def run_entry(
    entry: Entry, inputs: Inputs, shape: Shape, call: Call, journal: Journal, bench: Bench
) -> None:
    """Check and time what is missing of an entry at a shape."""
    begun = time.monotonic()
    try:
        for row in bench.rows(entry, inputs, shape, journal.untried(call, entry.passes)):
            journal.add(row)
            say(row.text())
    except OutOfTime:
        if left := journal.untried(call, entry.passes):
            reason = f"the budget ended after {time.monotonic() - begun:.0f} s of it"
            passes = "" if FORWARD in left else BOTH
            stopped = Row(
                call.operator, call.backend, passes, call.tokens, batch=call.batch,
                heads=call.heads, status="stopped", reason=reason,
            )  # fmt: skip
            journal.add(stopped)
            say(stopped.text())
        raise


def go_on_after_failure(
    device: torch.device, journal: Journal, options: argparse.Namespace
) -> None:
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
    again += ["--since", str(journal.since)]
    # The timer would go on, and end the new program before it has a handler.
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.execv(sys.executable, again)


def say(line: str) -> None:
    """Write a line of the table."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
