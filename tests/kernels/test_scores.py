"""Bounded scores and sink logits: both backends, in sequences and steps, against the reference."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from xlstm_kernels import MLSTMState, Ring, hybrid_step, sliding_window_attention, window_step
from xlstm_kernels.dispatch import Backend
from xlstm_kernels.reference import mlstm_reference, sliding_window_reference
from xlstm_kernels.testing import (
    error_ratio,
    outputs_and_grads,
    random_inputs,
    random_segments,
    to_float64,
)
from xlstm_kernels.torch import bounded
from xlstm_kernels.torch.bounded import bounded_attention

BACKENDS: tuple[Backend, ...] = ("torch",)
if importlib.util.find_spec("triton") is not None:
    BACKENDS += ("triton",)
BOUND = 1e-5
# Scores are of size 4 here, so the bound bends them well.
CAP, SCALE = 3.0, 1.0
KINDS = [(CAP, False), (None, True), (CAP, True)]
# Interpreted kernels take seconds: one of the kinds, with both, is in the quick suite.
CASES = [
    pytest.param(backend, *kind, marks=pytest.mark.slow)
    if backend == "triton" and kind != KINDS[-1]
    else (backend, *kind)
    for backend in BACKENDS
    for kind in KINDS
]


def draw(
    B: int, H: int, G: int, T: int, D: int, *, logits: bool, device: str = "cpu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = {"q": (B, H, T, D), "k": (B, G, T, D), "v": (B, G, T, D)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if logits:
        found["sink_logits"] = torch.randn(H, generator=generator) + 2
    return {name: x.to(device).requires_grad_() for name, x in found.items()}


@pytest.mark.parametrize(("backend", "cap", "logits"), CASES)
def test_outputs_and_all_gradients_match_the_reference(
    device: str, backend: Backend, cap: float | None, logits: bool
) -> None:
    inputs = draw(1, 4, 2, 75, 16, logits=logits, device=device)
    # The sinks of the second document are before the band of its last queries.
    ids = (torch.arange(75, device=device) >= 9).long()[None] if logits else None
    settings = {"window": 12, "sinks": 3, "segment_ids": ids, "scale": SCALE, "softcap": cap}
    found = outputs_and_grads(
        lambda **x: sliding_window_attention(**x, **settings, backend=backend), inputs
    )
    expected = outputs_and_grads(
        lambda **x: sliding_window_reference(**x, **settings), to_float64(inputs)
    )
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        assert error_ratio(found[name], truth) < BOUND, name


@pytest.mark.parametrize("window", [1, 300, 2**30])
def test_any_window_in_any_blocks_matches_the_reference(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(bounded, "QUERIES_MAX", 32)
    inputs = draw(2, 4, 2, 101, 8, logits=True)
    ids = random_segments(2, 101, mean_length=25)
    settings = {"window": window, "sinks": 5, "segment_ids": ids, "scale": SCALE, "softcap": CAP}
    found = outputs_and_grads(lambda **x: sliding_window_attention(**x, **settings), inputs)
    settings["window"] = min(window, 101)
    expected = outputs_and_grads(
        lambda **x: sliding_window_reference(**x, **settings), to_float64(inputs)
    )
    for name, truth in expected.items():
        assert error_ratio(found[name], truth) < BOUND, name


def test_queries_of_the_last_tokens_see_the_keys_before_them() -> None:
    inputs = draw(2, 4, 2, 90, 8, logits=True)
    ids = random_segments(2, 90, mean_length=40)
    settings = {"sinks": 2, "segment_ids": ids, "scale": SCALE, "softcap": CAP}
    inputs = {name: x.detach() for name, x in inputs.items()}
    whole = bounded_attention(**inputs, window=20, **settings)
    inputs["q"] = inputs["q"][:, :, 70:]
    part = bounded_attention(**inputs, window=20, **settings)
    assert error_ratio(part, whole[:, :, 70:]) < 2e-6


# Measured at this shape: at most 3.1e-3 (bfloat16) and 3.9e-4 (float16).
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_low_precision_stays_near_the_reference(dtype: torch.dtype, most: float) -> None:
    inputs = {
        name: x.detach().to(dtype).requires_grad_()
        for name, x in draw(2, 4, 2, 150, 32, logits=True).items()
    }
    settings = {"window": 32, "sinks": 4, "softcap": CAP}
    found = outputs_and_grads(lambda **x: sliding_window_attention(**x, **settings), inputs)
    expected = outputs_and_grads(
        lambda **x: sliding_window_reference(**x, **settings), to_float64(inputs)
    )
    for name, truth in expected.items():
        assert found[name].dtype == dtype
        assert error_ratio(found[name], truth) < most, name


@pytest.mark.parametrize(("backend", "cap", "logits"), CASES)
def test_steps_equal_the_sequence(
    device: str, backend: Backend, cap: float | None, logits: bool
) -> None:
    B, H, G, T, D = 1, 4, 2, 7, 16
    x = {n: t.detach().to(device) for n, t in draw(B, H, G, T, D, logits=logits).items()}
    memory = random_inputs(B, H, T, 32, D, G)
    memory = {name: t.detach().to(device) for name, t in memory.items()}
    gate = torch.full((B, H), 0.25, device=device)
    settings = {"sinks": 2, "scale": SCALE, "softcap": cap, "sink_logits": x.get("sink_logits")}
    exact = {name: t.double() for name, t in x.items()}
    attended = sliding_window_reference(**exact, window=4, sinks=2, scale=SCALE, softcap=cap)
    recalled, _ = mlstm_reference(*(t.double() for t in (memory | {"v": x["v"]}).values()))
    rings = [Ring.empty(B, G, D, D, window=4, sinks=2, device=device) for _ in range(2)]
    state = MLSTMState.zeros(B, H, 32, D, device=device)
    alone, mixed = [], []
    for t in range(T):
        q, k, v = (x[name][:, :, t] for name in "qkv")
        token = (memory[name][:, :, t] for name in ("q", "k", "i", "f"))
        alone.append(window_step(q, k, v, rings[0], **settings, backend=backend))
        given = (*token, gate, state, rings[1])
        mixed.append(hybrid_step(q, k, v, *given, **settings, backend=backend))
    assert error_ratio(torch.stack(alone, dim=2), attended) < BOUND
    both = torch.lerp(attended, recalled, 0.25)
    assert error_ratio(torch.stack(mixed, dim=2), both) < BOUND


def test_what_is_not_allowed_is_named() -> None:
    x = {name: t.detach() for name, t in draw(1, 4, 2, 5, 16, logits=True).items()}
    for change, line in (
        ({"softcap": 0.0}, "softcap=0.0 is not allowed; a number above 0"),
        ({"softcap": float("nan")}, "softcap=nan is not allowed"),
        ({"sink_logits": torch.zeros(2)}, r"sink_logits has shape \(2,\); expected \(H,\) = \(4\)"),
        ({"sink_logits": torch.zeros(4).long()}, "sink_logits has dtype int64"),
    ):
        with pytest.raises(ValueError, match=line):
            sliding_window_attention(**(x | change), window=2, sinks=1)
        ring = Ring.empty(1, 2, 16, 16, window=2, sinks=1)
        token = {name: t[:, :, 0] for name, t in x.items() if name != "sink_logits"}
        with pytest.raises(ValueError, match=line):
            window_step(**token, ring=ring, sinks=1, **change)
