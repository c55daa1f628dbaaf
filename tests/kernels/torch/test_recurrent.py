"""The decoding step: equal to the whole pass, in place, constant in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xlstm_kernels import MLSTMState, mlstm, mlstm_step
from xlstm_kernels.reference import mlstm_reference
from xlstm_kernels.testing import error_ratio, random_inputs, to_float64


def steps(inputs: dict[str, Tensor], state: MLSTMState, start: int = 0) -> Tensor:
    """Decode the tokens from `start` on, one at a time: (B, H, T - start, Dv)."""
    tokens = zip(*(x[:, :, start:].unbind(2) for x in inputs.values()), strict=True)
    return torch.stack([mlstm_step(*token, state) for token in tokens], dim=2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_steps_equal_one_pass_and_reference(groups: int) -> None:
    inputs = random_inputs(B=2, H=4, T=100, Dk=16, Dv=12, G=groups, seed=groups)
    state = MLSTMState.zeros(2, 4, 16, 12)
    stepped = steps(inputs, state)
    h, final = mlstm(**inputs, return_state=True)
    assert error_ratio(stepped, h) < 2e-6
    assert error_ratio(stepped, mlstm_reference(**to_float64(inputs))[0]) < 1e-5
    for actual, expected in zip(state, final, strict=True):
        assert error_ratio(actual, expected) < 2e-6


def test_steps_continue_a_prefill() -> None:
    inputs = random_inputs(B=2, H=4, T=60, Dk=16, G=2, seed=5)
    with torch.no_grad():
        _, state = mlstm(**{name: x[:, :, :37] for name, x in inputs.items()}, return_state=True)
    state = MLSTMState(*(x.contiguous() for x in state))
    assert error_ratio(steps(inputs, state, start=37), mlstm(**inputs)[:, :, 37:]) < 2e-6


def test_state_returned_by_a_pass_can_be_stepped_as_it_is() -> None:
    inputs = random_inputs(B=1, H=2, T=41, Dk=8, seed=6)
    with torch.no_grad():
        _, state = mlstm(**{name: x[:, :, :40] for name, x in inputs.items()}, return_state=True)
    assert error_ratio(steps(inputs, state, start=40), mlstm(**inputs)[:, :, 40:]) < 2e-6


def test_state_keeps_its_addresses_and_records_no_gradient() -> None:
    inputs = random_inputs(B=1, H=2, T=5, Dk=8, seed=7)
    state = MLSTMState.zeros(1, 2, 8, 8)
    addresses = [x.data_ptr() for x in state]
    h = steps(inputs, state)
    assert [x.data_ptr() for x in state] == addresses
    assert not h.requires_grad
    assert not any(x.requires_grad for x in state)
    assert torch.count_nonzero(state.C) > 0


def test_extreme_gates_stay_exact() -> None:
    inputs = random_inputs(B=1, H=2, T=50, Dk=8, seed=8)
    draw = torch.Generator().manual_seed(9)
    for name in ("i", "f"):
        inputs[name] = 120.0 * torch.randint(0, 2, inputs[name].shape, generator=draw) - 60.0
    expected, _ = mlstm_reference(**to_float64(inputs))
    assert error_ratio(steps(inputs, MLSTMState.zeros(1, 2, 8, 8)), expected) < 1e-5


def test_zero_keys_give_zero() -> None:
    q, k, v, i, f = (
        x.detach()[:, :, 0] for x in random_inputs(B=1, H=2, T=1, Dk=8, seed=10).values()
    )
    h = mlstm_step(q, torch.zeros_like(k), v, i, f, MLSTMState.zeros(1, 2, 8, 8))
    assert torch.count_nonzero(h) == 0


def test_low_precision_tokens_keep_a_float32_state() -> None:
    inputs = {
        n: x.detach().bfloat16() for n, x in random_inputs(B=1, H=2, T=30, Dk=8, seed=11).items()
    }
    state = MLSTMState.zeros(1, 2, 8, 8)
    h = steps(inputs, state)
    assert h.dtype == torch.bfloat16
    assert {x.dtype for x in state} == {torch.float32}
    assert (
        error_ratio(h, mlstm_reference(**to_float64(inputs))[0]) < 3.2e-3
    )  # bfloat16 rounding of h


def test_traces_into_one_graph() -> None:
    inputs = {n: x.detach() for n, x in random_inputs(B=1, H=2, T=3, Dk=8, seed=12).items()}
    compiled = torch.compile(mlstm_step, backend="eager", fullgraph=True)
    expected, state, traced = [], MLSTMState.zeros(1, 2, 8, 8), MLSTMState.zeros(1, 2, 8, 8)
    for t in range(3):
        token = [x[:, :, t].contiguous() for x in inputs.values()]
        expected = mlstm_step(*token, state)
        assert torch.equal(compiled(*token, traced), expected)
