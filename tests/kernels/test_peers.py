"""Another library's kernels with a column of ones: exact in value and in every gradient."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from xlstm_kernels import MLSTMState, mlstm
from xlstm_kernels.peers import mlstm_ones_column
from xlstm_kernels.reference import mlstm_reference
from xlstm_kernels.testing import error_ratio, outputs_and_grads, random_inputs, to_float64

INSTALLED = importlib.util.find_spec("mlstm_kernels") is not None


@pytest.mark.peers
@pytest.mark.skipif(not INSTALLED, reason="mlstm_kernels is not installed")
@pytest.mark.parametrize(
    "kernel", ["native_custbw", pytest.param("triton_xl_chunk", marks=pytest.mark.slow)]
)
def test_a_column_of_ones_makes_the_kernel_exact(device: str, kernel: str) -> None:
    inputs = {
        n: x.detach().to(device).requires_grad_()
        for n, x in random_inputs(1, 2, 70, 32, 32, 1).items()
    }
    actual = outputs_and_grads(lambda **x: mlstm_ones_column(**x, kernel=kernel), inputs)
    expected = outputs_and_grads(lambda **x: mlstm_reference(**x)[0], to_float64(inputs))
    for name in expected:
        assert error_ratio(actual[name], expected[name]) < 1e-5, name


@pytest.mark.peers
@pytest.mark.skipif(not INSTALLED, reason="mlstm_kernels is not installed")
@pytest.mark.parametrize("name", ["segment_ids", "state", "return_state"])
def test_what_the_kernel_does_not_take_is_refused(name: str) -> None:
    given = {
        "segment_ids": torch.zeros(1, 5, dtype=torch.int64),
        "state": MLSTMState.zeros(1, 1, 16, 16),
        "return_state": True,
    }
    with pytest.raises(
        ValueError, match=rf"^mlstm: {name} is given, which backend='mlstm_kernels' does not take"
    ):
        mlstm(**random_inputs(1, 1, 5, 16), backend="mlstm_kernels", **{name: given[name]})


@pytest.mark.skipif(INSTALLED, reason="mlstm_kernels is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"^mlstm: backend='mlstm_kernels' needs the package mlstm_kernels, which is not",
    ):
        mlstm(**random_inputs(1, 1, 5, 16), backend="mlstm_kernels")
