"""Measure launch settings on a GPU and write a table of the fastest.

`python -m xlstm_kernels.benchmarks.tune --dims 64 128 --out DIR`

For each dtype and head dim, every candidate is compiled in other processes first; one that does not
fit the device is dropped. The others are checked against the torch backend in float64, then timed
at each number of heads. The chunk or block is varied first, forward and backward together; then the
launch of one kernel after the other, of which that kernel alone is timed. What has been timed is
kept in the output folder as it comes, and a tuner that is started again goes on there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pprint
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from xlstm_kernels.benchmarks.candidates import Config, Pruner, mlstm_rounds, window_rounds
from xlstm_kernels.benchmarks.checking import BOUNDS
from xlstm_kernels.benchmarks.parts import DONE, UNFINISHED, seconds
from xlstm_kernels.benchmarks.report import read_lines
from xlstm_kernels.benchmarks.timing import milliseconds
from xlstm_kernels.testing import (
    device_is_broken,
    error_ratio,
    outputs_and_grads,
    random_inputs,
    to_float64,
)
from xlstm_kernels.torch.chunkwise import mlstm_chunkwise
from xlstm_kernels.torch.window import banded_attention
from xlstm_kernels.triton import mlstm_forward
from xlstm_kernels.triton import table as triton_table
from xlstm_kernels.triton.configs import (
    MLSTMConfig,
    mlstm_config,
    width,
    window_config,
)
from xlstm_kernels.triton.mlstm import mlstm_triton
from xlstm_kernels.triton.window import window_triton

WINDOW, SINKS, GROUP = 512, 4, 4
CHECKED_TOKENS, REPEATS = 2 * (WINDOW + SINKS) + 65, 5
TEMPLATE = '''\
"""Launch settings by (bytes of a dot operand, head dim); the tuner writes this file."""

# The GPU on which these were the fastest forward + backward; None: chosen from registers, spills
# and shared memory of the compiled kernels, and not from times.
MEASURED_ON: str | None = {measured_on!r}

# chunk and tile, then (block_k, block_v, warps, stages) of: states, output, state grads; and
# (columns, depth, warps, stages) of the tokens' grads
MLSTM: dict[tuple[int, int], tuple] = {{
{mlstm}
}}  # fmt: skip

# block, forward warps and stages, backward warps and stages, warps of keys' and values' gradients
# and how many queries these take at a time
WINDOW: dict[tuple[int, int], tuple[int, ...]] = {window}
'''
Operator = Callable[..., Tensor]
Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """What is tuned: the inputs of the check, their truth, and those that are timed."""

    operator: str
    dtype: str
    dim: int
    small: Tensors
    truth: Tensors
    large: list[Tensors]

    @property
    def name(self) -> str:
        """As lines show it."""
        return f"{self.operator} {self.dtype} D={self.dim}"


def draw(
    operator: str, dtype: torch.dtype, dim: int, heads: int, tokens: int, device: str
) -> dict[str, Tensor]:
    """Draw the inputs of an operator; four query heads share a key or value head."""
    x = random_inputs(1, heads, tokens, dim, dim, heads // GROUP, forget_bias=6.0)
    if operator == "window":
        x = {"q": x["q"], "k": x["v"].detach().roll(1, dims=2), "v": x["v"]}
    gates = {"i": torch.float32, "f": torch.float32}
    drawn = {}
    for name, tensor in x.items():
        drawn[name] = tensor.detach().to(device, gates.get(name, dtype)).requires_grad_()
    return drawn


def operator_with(config: Config) -> Operator:
    """Make the Triton operator with these settings."""
    if isinstance(config, MLSTMConfig):
        return lambda **x: mlstm_triton(**x, segment_ids=None, state=None, config=config)[0]
    return lambda **x: window_triton(**x, **band_of(x["q"]), config=config)


def exact_operator(operator: str) -> Operator:
    """Make the torch backend's operator."""
    if operator == "mlstm":
        return lambda **x: mlstm_chunkwise(**x, segment_ids=None, state=None)[0]
    return lambda **x: banded_attention(**x, **band_of(x["q"]))


def band_of(q: Tensor) -> dict[str, Any]:
    """Return the settings of the attention that is tuned."""
    return {
        "window": WINDOW, "sinks": SINKS, "segment_ids": None, "scale": q.shape[3] ** -0.5,
    }  # fmt: skip


@contextmanager
def recorded_launches(kernels: tuple[str, ...]) -> Iterator[list[Callable[[], object]]]:
    """Yield a list that collects the launches of some kernels in this block, to be repeated."""
    # Every kernel is of one class: compiled, or interpreted.
    cls = type(mlstm_forward.chunk_kernel)
    launches: list[Callable[[], object]] = []
    launch = cls.run

    def run(self: Any, *args: Any, **kwargs: Any) -> object:
        if self.fn.__name__ in kernels:
            launches.append(lambda: launch(self, *args, **kwargs))
        return launch(self, *args, **kwargs)

    cls.run = run
    try:
        yield launches
    finally:
        cls.run = launch


def time_passes(run: Operator, large: Tensors, kernels: tuple[str, ...], repeats: int) -> float:
    """Return milliseconds forward and backward; of these kernels alone, if any are named."""

    def both() -> None:
        h = run(**large)
        torch.autograd.grad(h, list(large.values()), torch.ones_like(h))

    device = next(iter(large.values())).device
    if not kernels:
        return milliseconds(both, repeats, device)
    with recorded_launches(kernels) as launches:
        both()

    def alone() -> None:
        for launch in launches:
            launch()

    return milliseconds(alone, repeats, device)


def time_candidate(
    run: Operator,
    small: Tensors,
    truth: Mapping[str, Tensor],
    large: list[Tensors],
    bound: float,
    kernels: tuple[str, ...] = (),
    repeats: int = REPEATS,
) -> float:
    """Return milliseconds per head, averaged over the large inputs.

    Infinity if the candidate does not run, or if its RMS ratio to the truth on the small inputs is
    not below the bound.
    """
    try:
        found = outputs_and_grads(run, small)
        if not all(error_ratio(found[name], truth[name]) < bound for name in truth):
            return math.inf
        times = [time_passes(run, x, kernels, repeats) / x["q"].shape[1] for x in large]
    except OutOfResources:
        return math.inf
    except Exception as error:  # of a compiler: it raises whatever it likes
        if device_is_broken(next(iter(small.values())).device):
            raise
        sys.stdout.write(f"left out: {type(error).__name__}\n")
        return math.inf
    return sum(times) / len(times)


def key_of(case: Case, config: Config, kernels: tuple[str, ...]) -> str:
    """Name a candidate in the output folder."""
    return json.dumps([case.name, list(config), list(kernels)])


class Tuner:
    """Searches; keeps what it has timed, so that a second start goes on."""

    def __init__(self, out: Path, pruner: Pruner, ends: float, most: int | None) -> None:
        self.out, self.pruner, self.ends, self.most = out, pruner, ends, most
        self.path = out / "tuned.jsonl"
        self.known = {line["key"]: float(line["ms"]) for line in read_lines(self.path)}
        self.stopped = False  # the time was up before all was timed

    @property
    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        return time.time() > self.ends

    def timed(self, case: Case, config: Config, kernels: tuple[str, ...]) -> float:
        """Return a candidate's time, from an earlier run if it is known."""
        key = key_of(case, config, kernels)
        if key not in self.known:
            # Written first: a candidate that ends this process is not tried again.
            self._write(key, math.inf)
            self._write(key, self._measure(case, config, kernels))
        return self.known[key]

    def _measure(self, case: Case, config: Config, kernels: tuple[str, ...]) -> float:
        run = operator_with(config)
        bound = BOUNDS[case.dtype]
        return time_candidate(run, case.small, case.truth, case.large, bound, kernels)

    def _write(self, key: str, taken: float) -> None:
        self.known[key] = taken
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "ms": taken}) + "\n")

    def _prune(self, case: Case, configs: list[Config], kernels: tuple[str, ...]) -> None:
        """Drop what does not fit the device, for a second start too."""
        new = [config for config in configs if key_of(case, config, kernels) not in self.known]
        fitting = self.pruner.fitting(case.operator, case.dtype, case.dim, new, kernels)
        for config in new:
            if config not in fitting:
                self._write(key_of(case, config, kernels), math.inf)

    def tune(self, case: Case, best: Config) -> Config:
        """Search the settings of a case from those of the table; stops when the time is up."""
        rounds = mlstm_rounds(case.dim) if case.operator == "mlstm" else window_rounds(case.dim)
        for candidates, kernels in rounds:
            shortest = self.timed(case, best, kernels)
            tried = [config for config in candidates(best) if config != best][: self.most]
            if not self.out_of_time:
                self._prune(case, tried, kernels)
            for config in tried:
                if self.out_of_time and key_of(case, config, kernels) not in self.known:
                    self.stopped = True
                    return best
                taken = self.timed(case, config, kernels)
                if taken < shortest:
                    best, shortest = config, taken
                    sys.stdout.write(f"{case.name}: {taken:.4f} ms per head {tuple(config)}\n")
                    sys.stdout.flush()
        return best


def make_case(
    operator: str, name: str, dim: int, heads: list[int], tokens: int, device: str
) -> Case:
    """Draw the inputs of a case, and compute its truth."""
    dtype = getattr(torch, name)
    small = draw(operator, dtype, dim, GROUP, min(CHECKED_TOKENS, tokens), device)
    large = [draw(operator, dtype, dim, count, tokens, device) for count in heads]
    truth = outputs_and_grads(exact_operator(operator), to_float64(small))
    return Case(operator, name, dim, small, truth, large)


def name_of(dtype: torch.dtype) -> str:
    """Name a dtype as users write it."""
    return str(dtype).removeprefix("torch.")


def table_source(mlstm: dict, window: dict, measured_on: str | None) -> str:
    """Write the source of `triton/table.py`."""
    return TEMPLATE.format(
        measured_on=measured_on,
        mlstm="\n".join(map(mlstm_lines, mlstm, mlstm.values())),
        window=pprint.pformat(window, width=100),
    )


def mlstm_lines(key: tuple[int, int], entry: tuple) -> str:
    """Write an entry in two lines: the forward kernels, then the gradients."""
    chunk, tile, *launches = entry
    rows = [", ".join(map(str, map(tuple, half))) for half in (launches[:2], launches[2:])]
    return f"    {key}: ({chunk}, {tile}, {rows[0]},\n        {rows[1]}),"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_kernels.benchmarks.tune", description=__doc__.splitlines()[0]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument(
        "--dims", type=int, nargs="+", default=[64, 128], help="head dims; default 64 128"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"]
    )
    parser.add_argument(
        "--operators", nargs="+", choices=("mlstm", "window"), default=["mlstm", "window"]
    )
    parser.add_argument(
        "--heads", type=int, nargs="+", default=[32, 128],
        help="query heads, multiples of 4; a candidate is timed at each; default 32 128",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=8192, help="default 8192")
    parser.add_argument(
        "--out", type=Path, required=True,
        help="folder for tuned.jsonl and table.py; copy that one to xlstm_kernels/triton",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=min(16, os.cpu_count() or 1),
        help="that compile candidates and drop what does not fit; 0: none is dropped",
    )  # fmt: skip
    parser.add_argument("--budget-s", type=seconds, default=math.inf, help="seconds to stop after")
    parser.add_argument("--candidates", type=int, help="most of them in a round; default all")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Tune; the table is written after each case, and at the end of the budget.

    Returns the exit status (`benchmarks.parts`).
    """
    options = parse(arguments)
    on_gpu = options.device == "cuda"
    arch = 0
    if on_gpu:
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    measured_on = torch.cuda.get_device_name() if on_gpu else None
    pruner = Pruner(options.processes, arch)
    tuner = Tuner(options.out, pruner, time.time() + options.budget_s, options.candidates)
    tables = {"mlstm": dict(triton_table.MLSTM), "window": dict(triton_table.WINDOW)}
    cases = itertools.product(options.dtypes, options.dims, options.operators)
    try:
        for name, dim, operator in cases:
            if tuner.out_of_time:
                tuner.stopped = True
                break
            dtype = getattr(torch, name)
            start = mlstm_config(dtype, dim, dim) if operator == "mlstm" else None
            case = make_case(operator, name, dim, options.heads, options.tokens, options.device)
            best = tuner.tune(case, start or window_config(dtype, dim))
            entry = tuple(tuple(part) if isinstance(part, tuple) else part for part in best)
            tables[operator][width(dtype), dim] = entry
            source = table_source(tables["mlstm"], tables["window"], measured_on)
            (options.out / "table.py").write_text(source)
    finally:
        pruner.close()
    if not tuner.stopped:
        return DONE
    sys.stdout.write("Stopped: the time of --budget-s is up.\n")
    return UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
