"""Launch settings that the tuner tries, and which of them cannot be any good.

A candidate is compiled for the device in another process before it is timed: one that spills or
needs more shared memory than a program can have is dropped without the GPU's time.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from xlstm_kernels.toolchain import numbers, triton_version
from xlstm_kernels.triton.configs import Launch, MLSTMConfig, TokenLaunch, WindowConfig

# Tokens of a chunk, and of a tile of it.
CHUNKS, TOKENS = (64, 128), (32, 64)
TILES, DEPTHS, STAGES = (32, 64, 128), (32, 64), (1, 2, 3)
WARPS, NARROW, NARROW_WARPS = (4, 8), 32, (2, 4, 8)  # two up to a head dim: docs/kernels.md
BLOCKS, QUERIES = (16, 32, 64, 128), (16, 32, 64)
MOST_SPILLS = 64  # bytes a thread; what spills more has never been the fastest of its kind
# Up to 3.7, Triton may overwrite operands in registers too early where a product is still running
# when a pipelined loop goes on (triton 9433, 9514, 9530). It lets products of these kernels and of
# the window's run on. It waits for each product of the walks over chunks, which have such operands
# too; `objection` drops a candidate of which that is not so.
FED_FROM_REGISTERS = ("output", "token_grads")
SOUND_PIPELINE = (3, 8)
# The kernel whose launch a field of MLSTMConfig sets.
KERNELS = {
    "states": "state_kernel",
    "output": "output_kernel",
    "state_grads": "state_grad_kernel",
    "token_grads": "token_grad_kernel",
}
Config = MLSTMConfig | WindowConfig
# From the best settings so far to the next candidates; and the kernels that they differ in, none
# if they differ in all.
Round = tuple[Callable[[Any], list[Any]], tuple[str, ...]]


def pipeline_is_sound() -> bool:
    """Say whether this Triton keeps operands in registers as long as a product needs them."""
    return numbers(triton_version() or "") >= SOUND_PIPELINE


def stages(pipelines_registers: bool) -> tuple[int, ...]:
    """Return the stages to try; one alone where Triton's pipeline makes wrong code."""
    return STAGES if pipeline_is_sound() or not pipelines_registers else (1,)


def warps(dim: int) -> tuple[int, ...]:
    """Return the numbers of warps to try at a head dim."""
    return NARROW_WARPS if dim <= NARROW else WARPS


def mlstm_space(dim: int) -> dict[str, list[Any]]:
    """List what the tuner tries for each field of an MLSTMConfig, at a head dim."""
    tiles = sorted({min(tile, dim) for tile in TILES})
    depths = sorted({min(depth, dim) for depth in DEPTHS})
    space: dict[str, list[Any]] = {"chunk": list(CHUNKS), "tile": list(TOKENS)}
    for name in KERNELS:
        sound = stages(name in FED_FROM_REGISTERS)
        kind, blocks = (TokenLaunch, depths) if name == "token_grads" else (Launch, tiles)
        launches = itertools.product(tiles, blocks, warps(dim), sound)
        space[name] = list(itertools.starmap(kind, launches))
    return space


def mlstm_rounds(dim: int) -> Iterator[Round]:
    """Yield the rounds of the mLSTM: chunk, tile, then the launch of one kernel after the other."""

    def vary(name: str, values: Sequence[Any]) -> Callable[[MLSTMConfig], list[MLSTMConfig]]:
        return lambda best: [best._replace(**{name: value}) for value in values]

    for name, values in mlstm_space(dim).items():
        yield vary(name, values), (KERNELS[name],) if name in KERNELS else ()


def window_rounds(dim: int) -> Iterator[Round]:
    """Yield the rounds of the window: the block, then forward, backward, and keys and values."""
    pairs = list(itertools.product(warps(dim), stages(pipelines_registers=True)))
    yield lambda best: [best._replace(block=block) for block in BLOCKS], ()
    yield (
        lambda best: [best._replace(warps=each, stages=depth) for each, depth in pairs],
        ("window_kernel",),
    )
    yield (
        lambda best: [best._replace(grad_warps=each, grad_stages=depth) for each, depth in pairs],
        ("query_grad_kernel", "key_value_grad_kernel"),
    )
    yield (
        lambda best: [
            best._replace(key_grad_warps=each, key_grad_queries=queries)
            for each, queries in itertools.product(warps(dim), QUERIES)
            if queries <= best.block
        ],
        ("key_value_grad_kernel",),
    )


def objection(
    operator: str, dtype: str, dim: int, config: Config, arch: int, kernels: tuple[str, ...]
) -> str | None:
    """Say why a candidate cannot be any good on sm_<arch>; None if it may be.

    Compiles the operator's launches without a device; kernels: those to look at, all if empty.
    """
    from xlstm_kernels.benchmarks import resources

    launch = resources.launch_mlstm if operator == "mlstm" else resources.launch_window
    try:
        with resources.compiled_launches(arch, kernels) as found:
            launch(dim, getattr(torch, dtype), config)  # type: ignore[arg-type]
    except Exception as error:  # of a compiler: it raises whatever it likes
        return f"does not compile: {type(error).__name__}"
    for name, needs in found.items():
        if needs.spills > MOST_SPILLS:
            return f"{name} spills {needs.spills} bytes"
        if needs.shared > resources.most_shared(arch):
            return f"{name} needs {needs.shared} bytes of shared memory"
        if needs.in_flight and not pipeline_is_sound():
            return f"{name} leaves {needs.in_flight} products with operands in registers running"
    return None


class Pruner:
    """Drops candidates by compiling them in processes; with 0 processes, lets all through."""

    def __init__(self, processes: int, arch: int) -> None:
        self.arch = arch
        # Spawned: a fork would take the CUDA context with it.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(processes, context) if processes else None

    def fitting(
        self,
        operator: str,
        dtype: str,
        dim: int,
        configs: Sequence[Config],
        kernels: tuple[str, ...],
    ) -> list[Config]:
        """Return the candidates that compile for the device and fit it."""
        if self.pool is None:
            return list(configs)
        asked = [
            self.pool.submit(objection, operator, dtype, dim, config, self.arch, kernels)
            for config in configs
        ]
        return [
            config for config, answer in zip(configs, asked, strict=True) if answer.result() is None
        ]

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
