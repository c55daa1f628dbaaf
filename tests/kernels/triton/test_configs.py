"""The table of launch settings serves every shape that the dispatch lets through."""

from __future__ import annotations

import pytest
import torch

from xlstm_kernels.dispatch import HEAD_DIMS
from xlstm_kernels.triton.configs import mlstm_config, window_config


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
