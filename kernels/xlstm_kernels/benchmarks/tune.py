"""Measure launch settings on a GPU and rewrite `triton/table.py`.

`python -m xlstm_kernels.benchmarks.tune --dims 64 128`

For each dtype and head dim, every candidate is checked against the torch backend in float64, then
timed forward and backward. Candidates that do not compile, do not fit the device, or are inexact
are left out. The chunk or block is varied first, then the launch of one kernel after the other,
each time from the best so far.
"""

from __future__ import annotations

import argparse
import itertools
import math
import pprint
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from xlstm_kernels.benchmarks.checking import BOUNDS
from xlstm_kernels.benchmarks.timing import milliseconds
from xlstm_kernels.testing import error_ratio, outputs_and_grads, random_inputs, to_float64
from xlstm_kernels.torch.chunkwise import mlstm_chunkwise
from xlstm_kernels.torch.window import banded_attention
from xlstm_kernels.triton import table as triton_table
from xlstm_kernels.triton.configs import (
    Launch,
    MLSTMConfig,
    WindowConfig,
    mlstm_config,
    width,
    window_config,
)
from xlstm_kernels.triton.mlstm import mlstm_triton
from xlstm_kernels.triton.window import window_triton

CHUNKS, TILES, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
BLOCKS = (16, 32, 64, 128)
WINDOW, SINKS, GROUP = 512, 4, 4
CHECKED_TOKENS, REPEATS = 2 * (WINDOW + SINKS) + 65, 5
TEMPLATE = '''\
"""Launch settings by (bytes of a dot operand, head dim); the tuner writes this file."""

# The GPU on which these were the fastest forward + backward; None: chosen from registers, spills
# and shared memory of the compiled kernels, and not from times.
MEASURED_ON: str | None = {measured_on!r}

# chunk, then (block_k, block_v, warps, stages) of: states, output, state grads, query and key
# grads, value grads
MLSTM: dict[tuple[int, int], tuple] = {mlstm}

# block, forward warps and stages, backward warps and stages
WINDOW: dict[tuple[int, int], tuple[int, int, int, int, int]] = {window}
'''
Operator = Callable[..., Tensor]


def mlstm_rounds(dim: int) -> Iterator[Callable[[MLSTMConfig], list[MLSTMConfig]]]:
    """Yield functions from the best settings so far to the next candidates."""
    tiles = sorted({min(tile, dim) for tile in TILES})
    launches = list(itertools.starmap(Launch, itertools.product(tiles, tiles, WARPS, STAGES)))

    def vary(name: str, values: Sequence[Any]) -> Callable[[MLSTMConfig], list[MLSTMConfig]]:
        return lambda best: [best._replace(**{name: value}) for value in values]

    yield vary("chunk", CHUNKS)
    for kernel in MLSTMConfig._fields[1:]:
        yield vary(kernel, launches)


def window_rounds() -> Iterator[Callable[[WindowConfig], list[WindowConfig]]]:
    """Yield functions from the best settings so far to the next candidates."""
    pairs = list(itertools.product(WARPS, STAGES))
    yield lambda best: [best._replace(block=block) for block in BLOCKS]
    yield lambda best: [best._replace(warps=warps, stages=stages) for warps, stages in pairs]
    yield lambda best: [
        best._replace(grad_warps=warps, grad_stages=stages) for warps, stages in pairs
    ]


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


def operator_with(config: MLSTMConfig | WindowConfig) -> Operator:
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


def time_candidate(
    run: Operator,
    small: dict[str, Tensor],
    truth: dict[str, Tensor],
    large: dict[str, Tensor],
    bound: float,
    repeats: int = REPEATS,
) -> float:
    """Return milliseconds forward and backward, timed on the large inputs.

    Infinity if the candidate does not run, or if its RMS ratio to the truth on the small inputs is
    not below the bound.
    """

    def both() -> None:
        h = run(**large)
        torch.autograd.grad(h, list(large.values()), torch.ones_like(h))

    try:
        found = outputs_and_grads(run, small)
        if not all(error_ratio(found[name], truth[name]) < bound for name in truth):
            return math.inf
        return milliseconds(both, repeats, next(iter(large.values())).device)
    except (OutOfResources, CompilationError, PTXASError):
        return math.inf


def tune(
    operator: str, dtype: torch.dtype, dim: int, heads: int, tokens: int, device: str
) -> MLSTMConfig | WindowConfig:
    """Search the settings of an operator at one dtype and head dim."""
    small = draw(operator, dtype, dim, GROUP, min(CHECKED_TOKENS, tokens), device)
    large = draw(operator, dtype, dim, heads, tokens, device)
    truth = outputs_and_grads(exact_operator(operator), to_float64(small))
    bound = BOUNDS[name_of(dtype)]
    best = mlstm_config(dtype, dim, dim) if operator == "mlstm" else window_config(dtype, dim)
    shortest = time_candidate(operator_with(best), small, truth, large, bound)
    for candidates in mlstm_rounds(dim) if operator == "mlstm" else window_rounds():
        for config in candidates(best):  # type: ignore[arg-type]
            taken = time_candidate(operator_with(config), small, truth, large, bound)
            if taken < shortest:
                best, shortest = config, taken
                what = f"{operator} {name_of(dtype)} D={dim}"
                sys.stdout.write(f"{what}: {taken:.3f} ms {tuple(config)}\n")
    return best


def name_of(dtype: torch.dtype) -> str:
    """Name a dtype as users write it."""
    return str(dtype).removeprefix("torch.")


def table_source(mlstm: dict, window: dict, measured_on: str | None) -> str:
    """Write the source of `triton/table.py`."""
    return TEMPLATE.format(
        measured_on=measured_on,
        mlstm=pprint.pformat(mlstm, width=100),
        window=pprint.pformat(window, width=100),
    )


def main(arguments: list[str] | None = None) -> None:
    """Tune, then rewrite the table."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_kernels.benchmarks.tune", description=__doc__.splitlines()[0]
    )
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
        "--heads", type=int, default=128, help="query heads, a multiple of 4; default 128"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="default 8192")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device: times of the interpreter say nothing")
    tables = {"mlstm": dict(triton_table.MLSTM), "window": dict(triton_table.WINDOW)}
    for name, dim, operator in itertools.product(options.dtypes, options.dims, options.operators):
        dtype = getattr(torch, name)
        best = tune(operator, dtype, dim, options.heads, options.tokens, "cuda")
        entry = tuple(tuple(part) if isinstance(part, Launch) else part for part in best)
        tables[operator][width(dtype), dim] = entry
    source = table_source(tables["mlstm"], tables["window"], torch.cuda.get_device_name())
    Path(triton_table.__file__).write_text(source)


if __name__ == "__main__":
    main()
