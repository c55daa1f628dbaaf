"""Launch settings of the Triton kernels, by shape.

They are a table and not a search at run time, so that a run compiles what the tests compiled.
`python -m xlstm_kernels.benchmarks.tune` measures on a GPU and rewrites `triton/table.py`.
Nothing here imports Triton.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from xlstm_kernels.triton.table import MLSTM, WINDOW


class Launch(NamedTuple):
    """Settings of one kernel.

    block_k, block_v: tile of key features and of value features of a program. stages: of the
    software pipeline.
    """

    block_k: int
    block_v: int
    warps: int
    stages: int


class TokenLaunch(NamedTuple):
    """Settings of the kernel of the tokens' gradients.

    columns: features of a gradient that a program adds up at a time; for each of them the pairs'
    gradients are computed again. depth: features that a product multiplies at a time.
    """

    columns: int
    depth: int
    warps: int
    stages: int


class MLSTMConfig(NamedTuple):
    """Tokens of a chunk and of a tile of it, and the launch of each kernel.

    States are kept at the borders of chunks. A program of output or gradients takes a tile of
    tokens. Both are the same for all kernels, because they share what is kept for each.
    """

    chunk: int
    tile: int
    states: Launch
    output: Launch
    state_grads: Launch
    token_grads: TokenLaunch

    def numbers(self) -> list[int]:
        """List all settings, as registered operators take them."""
        return [self.chunk, self.tile, *(number for launch in self[2:] for number in launch)]

    @classmethod
    def of_numbers(cls, numbers: list[int]) -> MLSTMConfig:
        """Read what `numbers` lists."""
        width = len(Launch._fields)
        states, output, state_grads, token_grads = (
            numbers[at : at + width] for at in range(2, len(numbers), width)
        )
        return cls(
            chunk=numbers[0],
            tile=numbers[1],
            states=Launch(*states),
            output=Launch(*output),
            state_grads=Launch(*state_grads),
            token_grads=TokenLaunch(*token_grads),
        )


class WindowConfig(NamedTuple):
    """Tokens of a block of queries or keys; warps and stages, forward and backward (grad).

    key_grad_warps, key_grad_queries: of the gradients of keys and values, whose two sums take more
    registers; its queries come so many at a time, at most a block.
    """

    block: int
    warps: int
    stages: int
    grad_warps: int
    grad_stages: int
    key_grad_warps: int
    key_grad_queries: int


# Programs of the states' walks that an SM holds at the same time (docs/kernels.md).
PROGRAMS_AN_SM = 2
# Each super-chunk is walked twice, so that fewer gain nothing; shorter ones are mostly joins.
FEWEST_SUPER_CHUNKS, FEWEST_CHUNKS = 3, 8


def super_chunks(programs: int, chunks: int, processors: int) -> int:
    """Return into how many super-chunks a row's chunks are cut, so that no processor is idle.

    programs: of a walk over whole rows. processors: SMs of the device, 0 on a CPU.
    """
    room = PROGRAMS_AN_SM * processors // programs
    # With s of them, a program carries 2 chunks / s chunks and joins up to s ends. By its bytes, an
    # end is a quarter of a chunk: more than this many make the sum larger again.
    most = min(room, chunks // FEWEST_CHUNKS, math.isqrt(8 * chunks))
    return most if most >= FEWEST_SUPER_CHUNKS else 1


def width(dtype: torch.dtype) -> int:
    """Return the bytes of a dot operand: 2 for bfloat16, else 4.

    float16 has 4, because it is multiplied as TF32 (docs/kernels.md).
    """
    return 2 if dtype == torch.bfloat16 else 4


def mlstm_config(dtype: torch.dtype, key_dim: int, value_dim: int) -> MLSTMConfig:
    """Look up the settings for a head's dtype and dimensions.

    The table goes by the larger dimension, at least 32; tiles are cut to the dimensions, those of
    the tokens' gradients by the kernel.
    """
    chunk, tile, *launches, token_grads = MLSTM[width(dtype), max(32, key_dim, value_dim)]
    states, output, state_grads = (
        Launch(min(block_k, key_dim), min(block_v, value_dim), warps, stages)
        for block_k, block_v, warps, stages in launches
    )
    return MLSTMConfig(chunk, tile, states, output, state_grads, TokenLaunch(*token_grads))


def window_config(dtype: torch.dtype, dim: int) -> WindowConfig:
    """Look up the settings for a head's dtype and dimension, at least 32."""
    return WindowConfig(*WINDOW[width(dtype), max(32, dim)])
