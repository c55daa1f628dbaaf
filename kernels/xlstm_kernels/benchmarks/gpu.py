"""Run everything that a GPU has to show, in order of value: `make gpu OUT=DIR`.

The time on a GPU comes in short pieces. So each part has a limit, a part that has ended well is not
run again, and all results lie in the output folder as soon as they are there: `parts.jsonl` (what
each part did), `log.txt` (what it printed) and the folders of the benchmarks. Started again, it
goes on: with a part that its budget stopped, that failed, or some of whose rows failed. `--dry-run`
runs the same parts on a CPU in Triton's interpreter, with tiny shapes.

It needs torch, Triton and pytest; the last two parts need more, and are left out, with the names of
the missing packages, where those are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

from xlstm_kernels.benchmarks.parts import (
    DONE,
    GRACE,
    UNFINISHED,
    WITH_FAILURES,
    Part,
    dry_parts,
    parts,
    seconds,
)

SHORTEST = 60  # seconds that a part needs at least to show anything
STOP_GRACE = 5  # seconds that a part has to end after this program was asked to stop
POLL = 0.2
# How a part ended, by its exit status. All others are failures, a traceback's 1 among them.
ENDINGS = {DONE: "done", WITH_FAILURES: "done with failures", UNFINISHED: "unfinished"}
FAILURES = ("failed", "over its limit")
# New results come before another try of what failed: it may fail again.
AGAIN = {"failed": 1, "over its limit": 1, "done with failures": 2}
RESULTS = "parts.jsonl"


class Ledger:
    """What each part did, on the disk as soon as it is known; `last` is each part's last status."""

    def __init__(self, out: Path) -> None:
        self.path = out / RESULTS
        self.last: dict[str, str] = {}
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a line in which it was killed
                    known = json.loads(line)
                    self.last[known["part"]] = known["status"]

    def add(self, part: str, status: str, seconds: float, **facts: object) -> None:
        """Keep what a part did."""
        line = {"part": part, "status": status, "seconds": round(seconds, 1), **facts}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.last[part] = status


class Stop:
    """The signal that asked this program to stop; None while there is none."""

    signal: int | None = None

    def ask(self, number: int, _: object) -> None:
        """Handle a signal."""
        self.signal = number


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Collect SIGTERM, Ctrl-C and a closed terminal in this block."""
    stop = Stop()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, stop.ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ended(process: subprocess.Popen[bytes], limit: float, stop: Stop) -> bool:
    """Wait for a process until the limit, or until this program is asked to stop."""
    end = time.monotonic() + limit
    while time.monotonic() < end and stop.signal is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL)
            return True
    return False


def in_a_child(part: Part, log: TextIO, stop: Stop) -> int | None:
    """Run a part as a process; None if it was stopped. Its output goes to the log as it comes.

    At its limit, or when this program is asked to stop, it is asked to stop (SIGINT) and then
    killed, with everything that it started.
    """
    command = [sys.executable, "-u", "-m", part.module, *part.command()]
    # A group of its own gets signals as one. It stays in this session: who ends that ends it too.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0
    )
    try:
        if ended(process, part.limit, stop):
            return process.returncode
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE if stop.signal is None else STOP_GRACE)
        return None
    finally:
        # What it started and left running would hold the device's memory.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def in_this_process(part: Part, log: TextIO, stop: Stop) -> int | None:
    """Run a part here, as a test does that cannot wait for all imports; pytest as a child."""
    if part.module == "pytest":
        return in_a_child(part, log, stop)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return int(importlib.import_module(part.module).main(part.command()) or 0)
    finally:
        log.write(said.getvalue())


def run_parts(every: list[Part], options: argparse.Namespace, stop: Stop) -> int:
    """Run what has not ended well yet; returns the exit status, 1 if a part failed."""
    ledger, begun = Ledger(options.out), time.monotonic()
    chosen = [(n, part) for n, part in enumerate(every, 1) if n in (options.only or {n})]
    order = sorted(chosen, key=lambda each: AGAIN.get(ledger.last.get(each[1].name, ""), 0))
    endings: dict[str, str] = {}
    for number, part in order:
        title = f"part {number} of {len(every)}, {part.name}"
        left = options.budget_s - (time.monotonic() - begun) - GRACE
        if ledger.last.get(part.name) == "done" and not options.again:
            say(f"{title}: done before")
            endings[part.name] = "done"
        elif missing := part.missing():
            say(f"{title}: left out; bring wheels of {', '.join(missing)} and what they require")
            ledger.add(part.name, "left out", 0.0, missing=missing)
            endings[part.name] = "left out"
        elif left < min(part.limit, SHORTEST):
            say(f"{title}: not begun; --budget-s has {max(left, 0):.0f} s left")
            endings[part.name] = "not begun"
        else:
            status, took = run_part(title, part, min(part.limit, left), options, stop)
            if stop.signal is not None:
                ending = "stopped"
            elif status is None:
                ending = "unfinished" if left < part.limit else "over its limit"
            else:
                ending = ENDINGS.get(status, "failed")
            endings[part.name] = ending
            ledger.add(part.name, ending, took, exit=status)
            failed = f", exit status {status}; see log.txt" if ending == "failed" else ""
            say(f"{title}: {ending}{failed}, {took:.0f} s")
        if stop.signal is not None:
            say(f"Stopped by {signal.Signals(stop.signal).name}; the same command goes on.")
            return 128 + stop.signal
    say_endings(endings)
    return int(any(ending in FAILURES for ending in endings.values()))


def run_part(
    title: str, part: Part, limit: float, options: argparse.Namespace, stop: Stop
) -> tuple[int | None, float]:
    """Run a part; returns its exit status, None if it was stopped, and its seconds."""
    say(f"{title}: at most {limit:.0f} s")
    start, part = time.monotonic(), part._replace(limit=limit)
    with (options.out / "log.txt").open("a") as log:
        log.write(f"\n=== {title}: {part.module} {' '.join(part.command())}\n")
        log.flush()
        status = (in_this_process if options.in_process else in_a_child)(part, log, stop)
    return status, time.monotonic() - start


def say_endings(endings: dict[str, str]) -> None:
    """Write a line for each ending: how many parts, and which if there is more to do."""
    for ending in dict.fromkeys(endings.values()):
        names = [name for name, each in endings.items() if each == ending]
        say(f"{ending}: {len(names) if ending == 'done' else '; '.join(names)}")
    if set(endings.values()) - {"done"}:
        say("The same command goes on with what is not done.")


def bring(source: Path, out: Path) -> None:
    """Copy an earlier start's results to a folder that has none of its own."""
    if (out / RESULTS).is_file():
        say(f"{out} has results of its own: {source} is not read.")
        return
    found = [path for path in source.rglob("*") if path.is_file()]
    # The ledger last: with it, the folder counts as whole.
    for path in sorted(found, key=lambda path: path == source / RESULTS):
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)  # without its mode: the source may be read-only
    say(f"Goes on after {source}: {len(found)} files.")


def say(line: str) -> None:
    """Write a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; ends with status 2 and a line where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_kernels.benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument(
        "--from", type=Path, dest="source",
        help="folder of an earlier start; its results are copied to --out, if that has none",
    )  # fmt: skip
    parser.add_argument(
        "--budget-s", type=seconds, default=math.inf, help="seconds after which all has ended"
    )
    parser.add_argument("--only", nargs="+", type=int, help="numbers of the parts to run")
    parser.add_argument(
        "--again", action="store_true",
        help="run parts that are done, too: what was timed stays, the rest is tried again",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on a CPU, in Triton's interpreter"
    )
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    last = len(parts(options.out, ""))
    for number in options.only or ():
        if not 1 <= number <= last:
            parser.error(f"--only {number}: the parts are 1 to {last}")
    if options.source and not (options.source / RESULTS).is_file():
        parser.error(f"--from {options.source}: there is no {RESULTS} in it")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "log.txt").open("a").close()
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}; name a folder that can be written")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the parts.

    Returns 1 if one of them failed, 2 without a GPU, 128 + its number after a signal.
    """
    options = parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        # Its tests would all be skipped there, and count as done.
        say("There is no CUDA device. DRY=1 (--dry-run) tries it on a CPU.")
        return 2
    if options.source:
        bring(options.source.resolve(), options.out)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    workers = "-n 8" if importlib.util.find_spec("xdist") else ""
    every = dry_parts(options.out) if options.dry_run else parts(options.out, workers)
    with stop_signals() as stop:
        return run_parts(every, options, stop)


if __name__ == "__main__":
    sys.exit(main())
