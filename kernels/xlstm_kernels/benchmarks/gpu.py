"""Run everything that a GPU has to show, in order of value: `make gpu OUT=DIR`.

The time on a GPU comes in short pieces. So each part has a limit, a part that has ended well is not
run again, and all results lie in the output folder as soon as they are there: `parts.jsonl` (what
each part did), `log.txt` (what it printed) and the folders of the benchmarks. `--dry-run` runs the
same parts on a CPU in Triton's interpreter, with tiny shapes.

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
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

LIMIT = 540  # seconds of a part
GRACE = 20  # seconds between the request to stop and the kill
DISTILL = (
    "transformers", "accelerate", "safetensors", "numpy", "pydantic", "yaml", "rich", "typer",
    "datasets", "tokenizers", "psutil",
)  # fmt: skip


class Part(NamedTuple):
    """A part: the module that runs, its arguments, and the packages that it needs.

    limit: in seconds. fine: exit statuses that mean that it has shown what it had to show.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ("torch", "triton")
    limit: float = LIMIT
    fine: tuple[int, ...] = (0, 1)

    def missing(self) -> list[str]:
        """Name the packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def words(text: str, **paths: Path) -> tuple[str, ...]:
    """Split a command line; {name} in it stands for a path."""
    return tuple(word.format(**paths) for word in text.split())


HEADS = "--dtype bfloat16 --heads 32 128 --groups 8 --key-dim 128 --value-dim 128 --window 512"
FEW_HEADS = HEADS.replace("32 128 --groups 8", "8 --groups 2")
TINY = (
    "--device cpu --dtype float32 --heads 2 --groups 1 --key-dim 16 --value-dim 16 --window 8 "
    "--repeats 1 --batch 1"
)
# Without the suite's own settings and fixtures, which need more packages than that machine has.
TESTS = (
    "-c /dev/null --rootdir . --confcutdir tests/kernels --import-mode=importlib -q "
    "-p no:cacheprovider -m gpu tests/kernels/triton/test_gpu.py"
)


def parts(out: Path, tests: str) -> list[Part]:
    """List the parts for a GPU, the most valuable first. tests: options of pytest."""
    bench, tune = "xlstm_kernels.benchmarks.operators", "xlstm_kernels.benchmarks.tune"
    paper, steps, few, full = (
        out / f"bench-{name}" for name in ("paper", "decode", "few-heads", "full")
    )
    distill = "xlstm_distill.benchmarks"
    return [
        Part("smoke", "xlstm_kernels.benchmarks.smoke", words("--dims 128 64"), fine=(0,)),
        Part(
            "gpu tests", "pytest", words(f"{TESTS} {tests}"),
            needs=("torch", "triton", "pytest"),
        ),
        Part(
            "bench, the paper's shape", bench,
            words(
                f"{HEADS} --batch 1 --tokens 8192 --operators mlstm window causal "
                "--budget-s 480 --report {out}", out=paper,
            ),
        ),
        Part(
            "bench, decoding", bench,
            (
                *words(f"{HEADS} --batch 1 8 64 --tokens 1 --budget-s 300"),
                "--report", str(steps), "--operators", "mlstm step", "hybrid step",
            ),
        ),
        Part(
            "tuner", tune, words("--dims 128 64 --budget-s 500 --out {out}", out=out / "tune"),
            fine=(0,),
        ),
        Part(
            "bench, few heads", bench,
            (
                *words(f"{FEW_HEADS} --batch 1 --tokens 8192 65536 --budget-s 300"),
                "--report", str(few), "--operators", "mlstm super-chunks", "mlstm",
            ),
        ),
        Part(
            "bench, all lengths", bench,
            words(
                f"{HEADS} --batch 1 --tokens 1024 4096 16384 32768 65536 131072 "
                "--operators mlstm window causal --budget-s 500 --report {out}", out=full,
            ),
        ),
        Part(
            "training step, 1B", f"{distill}.training",
            words("--model 1b --dtype bfloat16 --repeats 1 --checkpointing"),
            needs=("torch", "triton", *DISTILL),
        ),
        Part(
            "prefill and decode, 8B", f"{distill}.decoding",
            words("--model 8b --dtype bfloat16 --prompts 1024 8192 32768 --batches 1 8"),
            needs=("torch", "triton", *DISTILL),
        ),
    ]  # fmt: skip


def dry_parts(out: Path) -> list[Part]:
    """List the same parts with tiny shapes, for Triton's interpreter on a CPU."""
    tiny = {
        "smoke": words("--device cpu --dims 16 --dtypes float32 --tokens 21"),
        "gpu tests": words(f"{TESTS} --collect-only"),
        "bench, the paper's shape": words(
            f"{TINY} --tokens 20 --operators mlstm window --budget-s 480 --report {{out}}",
            out=out / "bench-paper",
        ),
        "bench, decoding": (
            *words(f"{TINY} --tokens 1 --budget-s 300 --report {{out}}", out=out / "bench-decode"),
            "--operators", "mlstm step", "hybrid step",
        ),
        "tuner": words(
            "--device cpu --dtypes float32 --dims 16 --heads 4 --tokens 20 --candidates 1 "
            "--processes 0 --operators mlstm --out {out}", out=out / "tune",
        ),
        "bench, few heads": (
            *words(f"{TINY} --tokens 130 --report {{out}}", out=out / "bench-few-heads"),
            "--operators", "mlstm super-chunks",
        ),
        "bench, all lengths": words(
            f"{TINY} --tokens 16 20 --operators causal --report {{out}}", out=out / "bench-full"
        ),
        "training step, 1B": words(
            "--device cpu --model small --context 16 --batch 1 --window 8 --top-k 8 --warmup 0 "
            "--steps 1 --repeats 1 --only 0"
        ),
        "prefill and decode, 8B": words(
            "--device cpu --dtype float32 --model tiny --prompts 20 --batches 1 --tokens 2"
        ),
    }  # fmt: skip
    return [part._replace(arguments=tiny[part.name]) for part in parts(out, "")]


class Ledger:
    """What each part did, on the disk as soon as it is known."""

    def __init__(self, out: Path) -> None:
        self.path = out / "parts.jsonl"
        self.done: set[str] = set()
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a line in which it was killed
                    known = json.loads(line)
                    if known["status"] == "done":
                        self.done.add(known["part"])

    def add(self, part: str, status: str, seconds: float, **facts: object) -> None:
        """Keep what a part did."""
        line = {"part": part, "status": status, "seconds": round(seconds, 1), **facts}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if status == "done":
            self.done.add(part)


def in_a_child(part: Part, log: TextIO) -> int | None:
    """Run a part as a process; None if it passed its limit. Its output goes to the log as it comes.

    It is asked to stop (SIGINT) before it is killed, with everything that it started.
    """
    command = [sys.executable, "-u", "-m", part.module, *part.arguments]
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    for limit, asked in ((part.limit, signal.SIGINT), (GRACE, signal.SIGKILL)):
        try:
            status = process.wait(limit)
            return status if asked == signal.SIGINT else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, asked)
    process.wait()
    return None


def in_this_process(part: Part, log: TextIO) -> int | None:
    """Run a part here, as a test does that cannot wait for all imports; pytest as a child."""
    if part.module == "pytest":
        return in_a_child(part, log)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return int(importlib.import_module(part.module).main(list(part.arguments)) or 0)
    finally:
        log.write(said.getvalue())


def run_parts(todo: Sequence[Part], out: Path, options: argparse.Namespace) -> int:
    """Run what has not ended well yet; returns the number of parts that failed."""
    ledger, failed, begun = Ledger(out), 0, time.monotonic()
    for number, part in enumerate(todo, 1):
        title = f"part {number} of {len(todo)}, {part.name}"
        if part.name in ledger.done:
            say(f"{title}: done before")
            continue
        if missing := part.missing():
            say(f"{title}: left out; bring wheels of: {', '.join(missing)}")
            ledger.add(part.name, "left out", 0.0, missing=missing)
            continue
        left = options.budget_s - (time.monotonic() - begun)
        if left < min(part.limit, 60):
            say(f"{title}: not begun; --budget-s has {left:.0f} s left")
            break
        say(f"{title}: at most {min(part.limit, left):.0f} s")
        start = time.monotonic()
        with (out / "log.txt").open("a") as log:
            log.write(f"\n=== {title}: {part.module} {' '.join(part.arguments)}\n")
            log.flush()
            run = in_this_process if options.in_process else in_a_child
            status = run(part._replace(limit=min(part.limit, left)), log)
        took = time.monotonic() - start
        if status is None:
            ledger.add(part.name, "over its limit", took)
        else:
            ledger.add(part.name, "done" if status in part.fine else "failed", took, exit=status)
        failed += status is None or status not in part.fine
        say(f"{title}: exit status {status}, {took:.0f} s")
    return failed


def say(line: str) -> None:
    """Write a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_kernels.benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument(
        "--budget-s", type=float, default=float("inf"), help="seconds after which no part begins"
    )
    parser.add_argument("--only", nargs="+", type=int, help="numbers of the parts to run")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on a CPU, in Triton's interpreter"
    )
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; returns 1 if one of them failed."""
    options = parse(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    workers = "-n 8" if importlib.util.find_spec("xdist") else ""
    todo = dry_parts(out) if options.dry_run else parts(out, workers)
    if options.only:
        todo = [part for number, part in enumerate(todo, 1) if number in options.only]
    missing = sorted({name for part in todo for name in part.missing()})
    if missing:
        say(f"Not installed here: {', '.join(missing)}. Parts that need them are left out.")
    return int(run_parts(todo, out, options) > 0)


if __name__ == "__main__":
    sys.exit(main())
