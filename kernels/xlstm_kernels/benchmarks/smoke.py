"""Run every kernel once against float64: `python -m xlstm_kernels.benchmarks.smoke`.

On CUDA kernels run in another process, as `xlstm-distill doctor` does it, and in a new one after a
kernel that broke it. Each verdict is printed and kept as it comes, so a second start asks only what
is left, and what runs next knows them. On a CPU, Triton's interpreter runs them here
(TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import sys

import torch

from xlstm_kernels.doctor import examine, questions
from xlstm_kernels.selfcheck import TOKENS, check
from xlstm_kernels.verdicts import Question, Verdict, facts_in_words


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_kernels.benchmarks.smoke", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64], help="default 128 64")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32", "float16"),
        default=["bfloat16", "float32", "float16"], help="default all three",
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help=f"of a row, on a CPU; default {TOKENS}"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print verdicts and versions; returns the exit status, 1 if a kernel is wrong."""
    options = parse(arguments)
    if options.device == "cpu":
        return on_a_cpu(options)
    found = examine(options.dims, options.dtypes, listener=show)
    for name, value in (found.versions | found.environment).items():
        say(f"{name:24} {value}")
    for device in found.devices:
        say(f"GPU {device.index}: {device.name}, {device.capability}, ptxas {device.ptxas}")
        for fault in device.faults:
            say(f"  known: {fault}")
    for line in found.advice:
        say(f"- {line}")
    if not found.devices:
        say("There is no CUDA device, or no Triton.")
    return int(not found.devices or not found.healthy)


def show(asked: Question, verdict: Verdict) -> None:
    """Print a verdict."""
    said = facts_in_words(verdict)
    word = "right" if verdict.right else "WRONG"
    say(f"  {word:6} {asked.words()}: {said} ({verdict.seconds} s)")


def on_a_cpu(options: argparse.Namespace) -> int:
    """Check in Triton's interpreter; its bfloat16 products are wrong in every version."""
    wrong = 0
    for dim in options.dims:
        for dtype in options.dtypes:
            for asked in questions(dim, dtype):
                verdict = check(asked, torch.device("cpu"), options.tokens)
                wrong += not verdict.right
                show(asked, verdict)
    return int(wrong > 0)


def say(line: str) -> None:
    """Write a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
