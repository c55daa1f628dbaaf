"""What `make gpu` runs, and how a part says how it ended.

The parts are in order of value. `dry_parts` are the same ones with tiny shapes, for a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

# Exit statuses of the parts. Python ends with 1 after a traceback and argparse with 2, and pytest
# uses 0 to 5: none of those may mean that a part has shown what it had to show.
DONE = 0
WITH_FAILURES = 10  # it came to its end, and some of its rows say that they failed
UNFINISHED = 11  # its budget was spent; started again, it goes on

GRACE = 20  # seconds between the request to stop and the kill
LIMIT = 540 - GRACE  # seconds of a part: with the grace, nine minutes
SPARE = 20  # seconds from the end of a part's own budget to its limit

# What the package index calls a module's package, where that is another name.
WHEELS = {"yaml": "PyYAML"}
KERNELS = ("torch", "triton")
STUDENT = (*KERNELS, "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "yaml")


class Part(NamedTuple):
    """A part: the module that runs, its arguments, and the packages that it needs.

    limit: in seconds. budget: of a module that takes --budget-s, the most seconds of it.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = KERNELS
    limit: float = LIMIT
    budget: float | None = None

    def missing(self) -> list[str]:
        """Name the packages that are not installed, as an index knows them."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return [WHEELS.get(name, name) for name in absent]

    def command(self) -> list[str]:
        """Return the arguments, with the budget that its limit leaves."""
        if self.budget is None:
            return list(self.arguments)
        return [*self.arguments, "--budget-s", f"{min(self.budget, self.limit - SPARE):.0f}"]


def seconds(text: str) -> float:
    """Read a budget from a command line: a finite number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


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
PYTEST = (
    "-c /dev/null --rootdir . --confcutdir tests/kernels --import-mode=importlib -q "
    "-p no:cacheprovider -m gpu"
)
GPU_TESTS = "tests/kernels/triton/test_gpu.py"
# Those that compile few kernels first; pytest runs tests in the order in which they are named.
CHEAP_FIRST = (
    "test_mlstm_steps_race_free",
    "test_hybrid_steps_give_the_same_bits_whichever_program_is_last",
    "test_hybrid_steps_equal_the_torch_steps",
    "test_mlstm_gates_at_60",
    "test_mlstm_passes_equal_one_pass",
    "test_two_runs_give_the_same_bits",
    "test_mlstm_at_16k_tokens",
    "test_more_heads_than_65535",
    "test_mlstm_with_a_common_component",
    "test_compiled_equals_eager",
    "test_window",
    "test_mlstm_with_states",
)


def gpu_tests(options: str) -> tuple[str, ...]:
    """Return pytest's arguments."""
    return (*words(f"{PYTEST} {options}"), *(f"{GPU_TESTS}::{name}" for name in CHEAP_FIRST))


def parts(out: Path, tests: str) -> list[Part]:
    """List the parts for a GPU, the most valuable first. tests: options of pytest."""
    bench, tune = "xlstm_kernels.benchmarks.operators", "xlstm_kernels.benchmarks.tune"
    paper, steps, few, full = (
        out / f"bench-{name}" for name in ("paper", "decode", "few-heads", "full")
    )
    distill = "xlstm_distill.benchmarks"
    return [
        Part("smoke", "xlstm_kernels.benchmarks.smoke", words("--dims 128 64")),
        Part("gpu tests", "pytest", gpu_tests(tests), needs=(*KERNELS, "pytest")),
        Part(
            "bench, the paper's shape", bench,
            words(
                f"{HEADS} --batch 1 --tokens 8192 --operators mlstm window causal "
                "--report {out}", out=paper,
            ),
            budget=480,
        ),
        Part(
            "bench, decoding", bench,
            (
                *words(f"{HEADS} --batch 1 8 64 --tokens 1"),
                "--report", str(steps), "--operators", "mlstm step", "hybrid step",
            ),
            budget=300,
        ),
        Part(
            "tuner", tune, words("--dims 128 64 --out {out}", out=out / "tune"), budget=480,
        ),
        Part(
            "bench, few heads", bench,
            (
                *words(f"{FEW_HEADS} --batch 1 --tokens 8192 65536"),
                "--report", str(few), "--operators", "mlstm super-chunks", "mlstm",
            ),
            budget=300,
        ),
        Part(
            "bench, all lengths", bench,
            words(
                f"{HEADS} --batch 1 --tokens 1024 4096 16384 32768 65536 131072 "
                "--operators mlstm window causal --report {out}", out=full,
            ),
            budget=480,
        ),
        Part(
            "training step, 1B", f"{distill}.training",
            words(
                "--model 1b --dtype bfloat16 --repeats 1 --checkpointing --out {out}",
                out=out / "training.jsonl",
            ),
            # Rows of shards are read with pyarrow.
            needs=(*STUDENT, "accelerate", "pyarrow"), budget=480,
        ),
        Part(
            "prefill and decode, 8B", f"{distill}.decoding",
            words(
                "--model 8b --dtype bfloat16 --prompts 1024 8192 32768 --batches 1 8 --out {out}",
                out=out / "decoding.jsonl",
            ),
            needs=STUDENT, budget=480,
        ),
    ]  # fmt: skip


def dry_parts(out: Path) -> list[Part]:
    """List the same parts with tiny shapes, for Triton's interpreter on a CPU."""
    tiny = {
        "smoke": words("--device cpu --dims 16 --dtypes float32 --tokens 21"),
        "gpu tests": gpu_tests("--collect-only"),
        "bench, the paper's shape": words(
            f"{TINY} --tokens 20 --operators mlstm window --report {{out}}",
            out=out / "bench-paper",
        ),
        "bench, decoding": (
            *words(f"{TINY} --tokens 1 --report {{out}}", out=out / "bench-decode"),
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
            "--device cpu --dtype float32 --model tiny --prompts 20 --batches 1 --tokens 2 "
            "--out {out}", out=out / "decoding.jsonl",
        ),
    }  # fmt: skip
    return [part._replace(arguments=tiny[part.name]) for part in parts(out, "")]
