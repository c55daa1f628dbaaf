"""Validation: one line that names the argument, its value and what is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xlstm_kernels import MLSTMState, mlstm, mlstm_step, sliding_window_attention
from xlstm_kernels.testing import random_inputs


def inputs(**changes: Tensor) -> dict[str, Tensor]:
    return random_inputs(B=2, H=4, T=10, Dk=8, Dv=6, G=2) | changes


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


BAD_MLSTM = {
    "rank of q": (inputs(q=zeros(2, 4, 10)), r"q has shape \(2, 4, 10\); expected \(B, H, T, Dk\)"),
    "no tokens": (inputs(q=zeros(2, 4, 0, 8)), r"q has shape \(2, 4, 0, 8\); expected .* any >= 1"),
    "k unlike q": (
        inputs(k=zeros(2, 4, 10, 7)),
        r"k has shape \(2, 4, 10, 7\); expected .* \(2, 4, 10, 8\)",
    ),
    "heads": (inputs(v=zeros(2, 3, 10, 6)), r"v has 3 heads; the 4 heads of q must be a multiple"),
    "length of v": (inputs(v=zeros(2, 2, 9, 6)), r"v has shape \(2, 2, 9, 6\); expected"),
    "gate i": (
        inputs(i=zeros(2, 4, 11)),
        r"i has shape \(2, 4, 11\); expected \(B, H, T\) = \(2, 4, 10\)",
    ),
    "gate f": (inputs(f=zeros(2, 2, 10)), r"f has shape \(2, 2, 10\)"),
    "integers": (
        inputs(v=zeros(2, 2, 10, 6, dtype=torch.int64)),
        r"v has dtype int64; allowed: float32, bfloat16",
    ),
    "device": (
        inputs(v=zeros(2, 2, 10, 6, device="meta")),
        r"v is on meta, but the first argument is on cpu",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_MLSTM.values(), ids=BAD_MLSTM.keys())
def test_mlstm_refuses_bad_tensors(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^mlstm: {message}") as error:
        mlstm(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            zeros(2, 9, dtype=torch.int64),
            r"segment_ids has shape \(2, 9\); expected \(B, T\) = \(2, 10\)",
        ),
        (zeros(2, 10), r"segment_ids has dtype float32; allowed: integers"),
        (zeros(2, 10, dtype=torch.bool), r"segment_ids has dtype bool; allowed: integers"),
        (
            zeros(2, 10, dtype=torch.int32, device="meta"),
            r"segment_ids is on meta, but q is on cpu",
        ),
    ],
)
def test_segment_ids_are_checked(ids: Tensor, message: str) -> None:
    x = inputs()
    with pytest.raises(ValueError, match=f"^mlstm: {message}"):
        mlstm(**x, segment_ids=ids)
    with pytest.raises(ValueError, match=f"^sliding_window_attention: {message}"):
        sliding_window_attention(x["q"], x["k"], x["k"], window=2, sinks=1, segment_ids=ids)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            MLSTMState.zeros(2, 4, 8, 5),
            r"state.C has shape \(2, 4, 8, 5\); expected .* \(2, 4, 8, 6\)",
        ),
        (MLSTMState.zeros(2, 4, 8, 6)._replace(m=zeros(2, 3)), r"state.m has shape \(2, 3\)"),
        (
            MLSTMState.zeros(2, 4, 8, 6, dtype=torch.bfloat16),
            r"state.C has dtype bfloat16; allowed: float32",
        ),
        (MLSTMState.zeros(2, 4, 8, 6, device="meta"), r"state.C is on meta, but q is on cpu"),
    ],
)
def test_state_is_checked(state: MLSTMState, message: str) -> None:
    with pytest.raises(ValueError, match=f"^mlstm: {message}"):
        mlstm(**inputs(), state=state)
    with pytest.raises(ValueError, match=f"^mlstm_step: {message}"):
        mlstm_step(*(x[:, :, 0] for x in inputs().values()), state)


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"backend='cuda' is unknown; allowed: auto, torch, triton, mlstm_kernels$"
    ):
        mlstm(**inputs(), backend="cuda")


def test_auto_is_torch() -> None:
    assert torch.equal(mlstm(**inputs(), backend="auto"), mlstm(**inputs(), backend="torch"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(2, 8)}, r"q has shape \(2, 8\); expected \(B, H, Dk\)"),
        ({"k": zeros(2, 4, 9)}, r"k has shape \(2, 4, 9\)"),
        ({"v": zeros(2, 3, 6)}, r"v has 3 heads"),
        ({"f": zeros(2, 5)}, r"f has shape \(2, 5\); expected \(B, H\)"),
        ({"i": zeros(2, 4, dtype=torch.int32)}, r"i has dtype int32"),
    ],
)
def test_step_refuses_bad_tensors(change: dict[str, Tensor], message: str) -> None:
    token = {name: x[:, :, 0] for name, x in inputs().items()} | change
    with pytest.raises(ValueError, match=f"^mlstm_step: {message}"):
        mlstm_step(**token, state=MLSTMState.zeros(2, 4, 8, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, r"window=0 is not allowed; at least 1"),
        ({"sinks": -1}, r"sinks=-1 is not allowed; 0 or more"),
        ({"k": zeros(2, 3, 10, 8), "v": zeros(2, 3, 10, 8)}, r"k has 3 heads; the 4 heads of q"),
        ({"k": zeros(2, 2, 10, 4)}, r"k has shape \(2, 2, 10, 4\)"),
        ({"v": zeros(2, 1, 10, 8)}, r"v has shape \(2, 1, 10, 8\); expected \(B, G, T, D\), as k"),
        ({"q": zeros(4, 10, 8)}, r"q has shape \(4, 10, 8\); expected \(B, H, T, D\)"),
    ],
)
def test_window_attention_refuses_bad_arguments(change: dict, message: str) -> None:
    arguments = {
        "q": zeros(2, 4, 10, 8),
        "k": zeros(2, 2, 10, 8),
        "v": zeros(2, 2, 10, 8),
        "window": 4,
        "sinks": 2,
    }
    with pytest.raises(ValueError, match=f"^sliding_window_attention: {message}"):
        sliding_window_attention(**(arguments | change))
