"""The hybrid decoding step: equal to the sequence operators, in place; torch and Triton."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from xlstm_kernels import MLSTMState, Ring, hybrid_step, mlstm_step
from xlstm_kernels.reference import mlstm_reference, sliding_window_reference
from xlstm_kernels.testing import error_ratio, random_inputs

B, H, G, D, Dk, Dv = 2, 4, 2, 16, 32, 16
BOUND = 1e-5
WITH_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def draw_row(device: str, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw what a mixer computes from `tokens` tokens, in the order of hybrid_step's arguments, (B, heads, T, ...)."""
    x = {name: t.detach() for name, t in random_inputs(B, H, tokens, Dk, Dv, G, seed=seed).items()}
    draw = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(B, H, tokens, D, generator=draw),
        torch.randn(B, G, tokens, D, generator=draw),
    )
    gate = torch.rand(B, H, tokens, generator=draw)
    row = {
        "q": q,
        "k": k,
        "v": x["v"],
        "phi_q": x["q"],
        "phi_k": x["k"],
        "i": x["i"],
        "f": x["f"],
        "gate": gate,
    }
    return {name: t.to(device) for name, t in row.items()}


def decode(
    row: dict[str, Tensor], window: int, sinks: int, backend: str
) -> tuple[Tensor, MLSTMState, Ring]:
    device, tokens = row["q"].device, row["q"].shape[2]
    state = MLSTMState.zeros(B, H, Dk, Dv, device=device)
    ring = Ring.empty(B, G, D, Dv, window=window, sinks=sinks, device=device)
    if (
        backend == "triton"
    ):  # its kernel reads no empty slot; torch's softmax reads them with weight 0
        ring.keys.fill_(float("nan"))
        ring.values.fill_(float("nan"))
    addresses = [x.data_ptr() for x in (*state, *ring)]
    outputs = [
        hybrid_step(*(x[:, :, t] for x in row.values()), state, ring, sinks=sinks, backend=backend)
        for t in range(tokens)
    ]
    assert [x.data_ptr() for x in (*state, *ring)] == addresses
    return torch.stack(outputs, dim=2), state, ring


def expected_row(row: dict[str, Tensor], window: int, sinks: int) -> Tensor:
    x = {name: t.double() for name, t in row.items()}
    recalled, _ = mlstm_reference(x["phi_q"], x["phi_k"], x["v"], x["i"], x["f"])
    attended = sliding_window_reference(x["q"], x["k"], x["v"], window=window, sinks=sinks)
    return torch.lerp(attended, recalled, x["gate"].unsqueeze(-1))


@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (3, 0), (4, 6), (40, 4)])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=WITH_TRITON)])
def test_steps_equal_the_sequence_operators(
    device: str, backend: str, window: int, sinks: int
) -> None:
    row = draw_row(device, 17)
    out, state, ring = decode(row, window, sinks, backend)
    assert error_ratio(out, expected_row(row, window, sinks)) < BOUND
    x = {name: t.double() for name, t in row.items()}
    _, final = mlstm_reference(x["phi_q"], x["phi_k"], x["v"], x["i"], x["f"])
    for actual, expected in zip(state, final, strict=True):
        assert error_ratio(actual, expected) < BOUND
    assert ring.lengths.tolist() == [17] * B


@WITH_TRITON
def test_both_backends_keep_the_same_ring(device: str) -> None:
    row = draw_row(device, 11, seed=1)
    rings = [decode(row, 4, 2, backend)[2] for backend in ("torch", "triton")]
    for ours, theirs in zip(*rings, strict=True):
        assert torch.equal(ours, theirs)
    assert rings[0].positions[0].tolist() == [0, 1, 8, 9, 10, 7]


@WITH_TRITON
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_triton_step_equals_reference(device: str, groups: int) -> None:
    inputs = {
        n: x.detach().to(device)
        for n, x in random_inputs(2, 4, 9, 32, 16, groups, seed=groups).items()
    }
    state = MLSTMState.zeros(2, 4, 32, 16, device=device)
    addresses = [x.data_ptr() for x in state]
    steps = [
        mlstm_step(*(x[:, :, t] for x in inputs.values()), state, backend="triton")
        for t in range(9)
    ]
    h, final = mlstm_reference(**{n: x.double() for n, x in inputs.items()})
    assert error_ratio(torch.stack(steps, dim=2), h) < BOUND
    for actual, expected in zip(state, final, strict=True):
        assert error_ratio(actual, expected) < BOUND
    assert [x.data_ptr() for x in state] == addresses


@WITH_TRITON
def test_triton_step_takes_a_state_that_is_a_view(device: str) -> None:
    inputs = [x.detach()[:, :, 0].to(device) for x in random_inputs(1, 2, 1, 16, seed=3).values()]
    plain = MLSTMState.zeros(1, 2, 16, 16, device=device)
    wide = torch.zeros(1, 2, 16, 17, device=device)
    viewed = plain._replace(C=wide[..., :-1], n=wide[..., -1], m=plain.m.clone())
    assert torch.equal(
        mlstm_step(*inputs, plain, backend="triton"), mlstm_step(*inputs, viewed, backend="triton")
    )
    assert torch.equal(plain.C, viewed.C)
    assert torch.equal(plain.n, viewed.n)


@WITH_TRITON
def test_extreme_gates_stay_exact_in_the_step(device: str) -> None:
    inputs = {n: x.detach() for n, x in random_inputs(1, 2, 20, 16, seed=8).items()}
    draw = torch.Generator().manual_seed(9)
    for name in ("i", "f"):
        inputs[name] = 120.0 * torch.randint(0, 2, inputs[name].shape, generator=draw) - 60.0
    inputs = {n: x.to(device) for n, x in inputs.items()}
    state = MLSTMState.zeros(1, 2, 16, 16, device=device)
    steps = [
        mlstm_step(*(x[:, :, t] for x in inputs.values()), state, backend="triton")
        for t in range(20)
    ]
    expected, _ = mlstm_reference(**{n: x.double() for n, x in inputs.items()})
    assert error_ratio(torch.stack(steps, dim=2), expected) < BOUND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(2, 3)}, r"gate has shape \(2, 3\); expected \(B, H\) = \(2, 4\)"),
        ({"q": torch.zeros(2, 3, 16)}, r"q has shape \(2, 3, 16\)"),
        ({"k": torch.zeros(2, 2, 8)}, r"k has shape \(2, 2, 8\)"),
        (
            {"phi_k": torch.zeros(2, 4, 8)},
            r"phi_k has shape \(2, 4, 8\); expected \(B, H, Dk\), as phi_q",
        ),
    ],
)
def test_bad_tensors_are_refused(change: dict[str, Tensor], message: str) -> None:
    token = {name: x[:, :, 0] for name, x in draw_row("cpu", 1).items()} | change
    ring = Ring.empty(B, G, D, Dv, window=4, sinks=2)
    with pytest.raises(ValueError, match=f"^hybrid_step: {message}"):
        hybrid_step(*token.values(), MLSTMState.zeros(B, H, Dk, Dv), ring, sinks=2)


def test_a_ring_that_does_not_fit_is_refused() -> None:
    token = [x[:, :, 0] for x in draw_row("cpu", 1).values()]
    state = MLSTMState.zeros(B, H, Dk, Dv)
    ring = Ring.empty(B, G, D, Dv, window=4, sinks=2)
    with pytest.raises(
        ValueError, match=r"^hybrid_step: sinks=6 is not allowed; the ring's 6 slots hold 0 to 5"
    ):
        hybrid_step(*token, state, ring, sinks=6)
    with pytest.raises(ValueError, match=r"^hybrid_step: ring.keys has shape \(2, 2, 6, 8\)"):
        hybrid_step(*token, state, ring._replace(keys=ring.keys[..., :8]), sinks=2)
    with pytest.raises(
        ValueError, match=r"^hybrid_step: ring.keys has dtype int32; allowed: float32, bfloat16"
    ):
        hybrid_step(*token, state, ring._replace(keys=ring.keys.int()), sinks=2)
    with pytest.raises(
        ValueError, match=r"^hybrid_step: ring.lengths has dtype int32; allowed: int64"
    ):
        hybrid_step(*token, state, ring._replace(lengths=ring.lengths.int()), sinks=2)
