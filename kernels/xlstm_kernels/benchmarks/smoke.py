"""Run every kernel once against float64: `python -m xlstm_kernels.benchmarks.smoke`.

On CUDA each kernel runs in a process of its own, as `xlstm-distill doctor` does it, and the
verdicts are kept, so that what runs next knows them. On a CPU, Triton's interpreter runs them here
(TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import sys

import torch

from xlstm_kernels.doctor import Device, examine, questions
from xlstm_kernels.selfcheck import TOKENS, check
from xlstm_kernels.verdicts import facts_in_words


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
    """Print versions and verdicts; returns the exit status, 1 if a kernel is wrong."""
    options = parse(arguments)
    if options.device == "cpu":
        return on_a_cpu(options)
    found = examine(options.dims, options.dtypes)
    for name, value in (found.versions | found.environment).items():
        say(f"{name:24} {value}")
    for device in found.devices:
        show(device)
    for line in found.advice:
        say(f"- {line}")
    if not found.devices:
        say("There is no CUDA device, or no Triton.")
    return int(not found.devices or not found.healthy)


def show(device: Device) -> None:
    """Print a device and its verdicts."""
    say(f"GPU {device.index}: {device.name}, {device.capability}, ptxas {device.ptxas}")
    for fault in device.faults:
        say(f"  known: {fault}")
    for words, verdict in device.verdicts.items():
        said = facts_in_words(verdict)
        say(f"  {'right' if verdict.right else 'WRONG':6} {words}: {said} ({verdict.seconds} s)")


def on_a_cpu(options: argparse.Namespace) -> int:
    """Check in Triton's interpreter; its bfloat16 products are wrong in every version."""
    wrong = 0
    for dim in options.dims:
        for dtype in options.dtypes:
            for asked in questions(dim, dtype):
                verdict = check(asked, torch.device("cpu"), options.tokens)
                wrong += not verdict.right
                said = facts_in_words(verdict)
                say(f"  {'right' if verdict.right else 'WRONG':6} {asked.words()}: {said}")
    return int(wrong > 0)


def say(line: str) -> None:
    """Write a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
