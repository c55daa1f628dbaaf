"""Launch settings of the Triton kernels by shape: a table, not a search: runs compile what the tests compiled.

`python -m xlstm_kernels.benchmarks.tune` measures on a GPU and rewrites `triton/table.py`; nothing here imports Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xlstm_kernels.triton.table import MLSTM, WINDOW


class Launch(NamedTuple):
    """Tile of key features and of value features of a program, warps, and stages of the software pipeline."""

    block_k: int
    block_v: int
    warps: int
    stages: int


class MLSTMConfig(NamedTuple):
    """Tokens of a chunk, one for all kernels since they share the states, and each kernel's launch."""

    chunk: int
    states: Launch
    output: Launch
    state_grads: Launch
    query_key_grads: Launch
    value_grads: Launch


class WindowConfig(NamedTuple):
    """Tokens of a block of queries or keys; warps and stages of the forward and of the backward kernels."""

    block: int
    warps: int
    stages: int
    grad_warps: int
    grad_stages: int


def width(dtype: torch.dtype) -> int:
    """Bytes of a dot operand: 2 for bfloat16; 4 otherwise, since float16 is computed as TF32 (docs/kernels.md)."""
    return 2 if dtype == torch.bfloat16 else 4


def mlstm_config(dtype: torch.dtype, key_dim: int, value_dim: int) -> MLSTMConfig:
    """Look up the settings of a head's dtype and larger dimension, tiles cut to its dimensions."""
    chunk, *launches = MLSTM[width(dtype), max(32, key_dim, value_dim)]
    cut = (
        Launch(min(k, key_dim), min(v, value_dim), warps, stages)
        for k, v, warps, stages in launches
    )
    return MLSTMConfig(chunk, *cut)


def window_config(dtype: torch.dtype, dim: int) -> WindowConfig:
    """Look up the settings of a head's dtype and dimension."""
    return WindowConfig(*WINDOW[width(dtype), max(32, dim)])
