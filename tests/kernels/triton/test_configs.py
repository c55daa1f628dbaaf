"""The table of launch settings serves every shape that the dispatch lets through."""

from __future__ import annotations

import pytest
import torch

from xlstm_kernels.dispatch import HEAD_DIMS
from xlstm_kernels.triton.configs import mlstm_config, super_chunks, window_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_allowed_shape_has_settings_that_divide_it(dtype: torch.dtype, dim: int) -> None:
    value_dim = min(2 * dim, 256)
    config = mlstm_config(dtype, dim, value_dim)
    for launch in config[2:-1]:
        assert dim % launch.block_k == 0
        assert value_dim % launch.block_v == 0
    assert config.chunk % config.tile == 0
    for size in config.token_grads[:2]:  # the kernel cuts them to the dims
        assert dim % min(size, dim) == value_dim % min(size, value_dim) == 0
    assert window_config(dtype, dim).block >= 16


# An H100 has 132 SMs. A row of 64k tokens has 512 chunks; 8 heads of 128 are 64 programs.
@pytest.mark.parametrize(
    ("programs", "chunks", "processors", "expected"),
    [
        (64, 512, 132, 4),  # 256 programs: two on each SM
        (64, 64, 132, 4),  # 8k tokens
        (64, 31, 132, 3),
        (64, 16, 132, 1),  # two of 8 chunks each would gain nothing: both passes walk half a row
        (128, 512, 132, 1),  # 16 heads
        (256, 512, 132, 1),
        (8, 512, 132, 33),
        (1, 512, 132, 64),  # more would join longer than they walk
        (64, 512, 0, 1),  # a CPU
    ],
)
def test_rows_are_cut_where_processors_would_be_idle(
    programs: int, chunks: int, processors: int, expected: int
) -> None:
    assert super_chunks(programs, chunks, processors) == expected
