"""Triton's sliding-window attention against its per-query float64 reference; small shapes for the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xlstm_kernels import sliding_window_attention
from xlstm_kernels.reference import sliding_window_reference
from xlstm_kernels.testing import error_ratio, outputs_and_grads, random_segments, to_float64
from xlstm_kernels.triton.configs import WindowConfig

pytestmark = pytest.mark.usefixtures("poisoned")
triton_window = pytest.importorskip(
    "xlstm_kernels.triton.window", reason="triton is not installed", exc_type=ImportError
)

BOUND = 1e-5
SMALL = WindowConfig(16, 4, 1, 4, 1)


def random_qkv(
    device: str, B: int, H: int, G: int, T: int, D: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"q": (B, H, T, D), "k": (B, G, T, D), "v": (B, G, T, D)}
    return {
        n: torch.randn(s, generator=draw).to(device).requires_grad_() for n, s in shapes.items()
    }


def assert_matches(
    inputs: dict[str, Tensor],
    window: int,
    sinks: int,
    ids: Tensor | None = None,
    bound: float = BOUND,
) -> None:
    scale = inputs["q"].shape[-1] ** -0.5
    actual = outputs_and_grads(
        lambda q, k, v: triton_window.window_triton(q, k, v, window, sinks, ids, scale, SMALL),
        inputs,
    )
    expected = outputs_and_grads(
        lambda **x: sliding_window_reference(**x, window=window, sinks=sinks, segment_ids=ids),
        to_float64(inputs),
    )
    for name in expected:
        if expected[name].any():
            assert error_ratio(actual[name], expected[name]) < bound, name
        else:  # each query sees one key: dq and dk are exactly 0 in the reference
            assert actual[name].abs().max() < bound, name


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 3), (16, 4), (17, 20), (100, 2)])
def test_outputs_and_all_gradients_match_reference(
    device: str, window: int, sinks: int, documents: bool
) -> None:
    ids = random_segments(1, 53, mean_length=20, seed=window).to(device) if documents else None
    assert_matches(random_qkv(device, 1, 2, 1, 53, seed=window), window, sinks, ids)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_any_length_matches_reference(device: str, tokens: int) -> None:
    assert_matches(random_qkv(device, 1, 1, 1, tokens, seed=tokens), 4, 2)


# Blocks hold 16 queries here: documents that end at their borders, next to them and inside, and a long one whose sinks
# many blocks read.
@pytest.mark.parametrize("lengths", [[16, 32, 22], [15, 1, 16, 33], [2, 1, 87]])
def test_documents_and_grouped_heads_match_reference(device: str, lengths: list[int]) -> None:
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].to(device)
    assert_matches(random_qkv(device, 1, 4, 2, sum(lengths), seed=1), 7, 4, ids)


# Measured in the interpreter: at most 3.9e-4.
def test_float16_loses_only_its_rounding(device: str) -> None:
    inputs = {
        n: x.detach().half().requires_grad_()
        for n, x in random_qkv(device, 1, 2, 1, 50, 32).items()
    }
    assert_matches(inputs, 20, 4, bound=6e-4)


def test_public_operator_runs_the_kernels_of_the_table(device: str) -> None:
    inputs = random_qkv(device, 1, 2, 1, 70, 32, seed=3)
    strided = {
        n: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for n, x in inputs.items()
    }
    ids = random_segments(1, 70, mean_length=30, seed=4).to(device)
    results = [
        outputs_and_grads(
            lambda backend=backend, **x: sliding_window_attention(
                **x, window=24, sinks=4, segment_ids=ids, scale=0.3, backend=backend
            ),
            inputs if backend == "torch" else strided,
        )
        for backend in ("torch", "triton")
    ]
    for name, expected in results[0].items():
        assert error_ratio(results[1][name], expected) < BOUND, name
