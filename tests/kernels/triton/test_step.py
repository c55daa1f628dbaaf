"""Triton's mLSTM step against the recurrent float64 reference."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from xlstm_kernels import MLSTMState, mlstm_step
from xlstm_kernels.reference import mlstm_reference
from xlstm_kernels.testing import error_ratio, random_inputs

pytest.importorskip("triton")

BOUND = 1e-5


def steps(inputs: dict[str, Tensor], state: MLSTMState) -> Tensor:
    """Decode all tokens, one at a time: (B, H, T, Dv)."""
    tokens = zip(*(x.unbind(2) for x in inputs.values()), strict=True)
    return torch.stack([mlstm_step(*token, state, backend="triton") for token in tokens], dim=2)


# Key dim 64 takes two tiles of rows of C.
@pytest.mark.parametrize(("groups", "key_dim"), [(1, 32), (2, 64), (4, 32)])
def test_steps_equal_the_reference(device: str, groups: int, key_dim: int) -> None:
    drawn = random_inputs(2, 4, 5, key_dim, 16, groups, seed=groups)
    inputs = {name: x.detach().to(device) for name, x in drawn.items()}
    state = MLSTMState.zeros(2, 4, key_dim, 16, device=device)
    addresses = [x.data_ptr() for x in state]
    stepped = steps(inputs, state)
    h, final = mlstm_reference(**{name: x.double() for name, x in inputs.items()})
    assert error_ratio(stepped, h) < BOUND
    for actual, expected in zip(state, final, strict=True):
        assert error_ratio(actual, expected) < BOUND
    assert [x.data_ptr() for x in state] == addresses


def test_a_state_may_be_a_view(device: str) -> None:
    inputs = [x.detach()[:, :, 0].to(device) for x in random_inputs(1, 2, 1, 16, seed=3).values()]
    plain = MLSTMState.zeros(1, 2, 16, 16, device=device)
    wide = torch.zeros(1, 2, 16, 17, device=device)
    viewed = plain._replace(C=wide[..., :-1], n=wide[..., -1], m=plain.m.clone())
    results = [mlstm_step(*inputs, state, backend="triton") for state in (plain, viewed)]
    assert torch.equal(*results)
    assert torch.equal(plain.C, viewed.C)
    assert torch.equal(plain.n, viewed.n)


def test_gates_at_60_match_the_reference(device: str) -> None:
    inputs = {name: x.detach() for name, x in random_inputs(1, 1, 20, 16, seed=8).items()}
    draw = torch.Generator().manual_seed(9)
    for name in ("i", "f"):
        inputs[name] = 120.0 * torch.randint(0, 2, inputs[name].shape, generator=draw) - 60.0
    inputs = {name: x.to(device) for name, x in inputs.items()}
    stepped = steps(inputs, MLSTMState.zeros(1, 1, 16, 16, device=device))
    expected, _ = mlstm_reference(**{name: x.double() for name, x in inputs.items()})
    assert error_ratio(stepped, expected) < BOUND


def test_a_larger_batch_leaves_the_counters_of_a_captured_graph() -> None:
    from xlstm_kernels.triton.step import counters

    held = torch.zeros(2)
    first = counters(held, 3)
    alive = weakref.ref(first)
    del first
    # A graph still counts at the first address: freed, it would be another tensor's memory.
    assert len(counters(held, 100)) >= 100
    assert alive() is not None
    assert counters(held, 3) is counters(held, 100)
    del held
    assert alive() is None
