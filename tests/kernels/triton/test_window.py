"""Triton's sliding-window attention against its per-query float64 reference.

The shapes are the smallest that take every branch of the kernels: the interpreter is slow.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xlstm_kernels import sliding_window_attention
from xlstm_kernels.reference import sliding_window_reference
from xlstm_kernels.testing import error_ratio, outputs_and_grads, random_segments, to_float64
from xlstm_kernels.triton.configs import WindowConfig

pytest.importorskip("triton")
from xlstm_kernels.triton import window as triton_window
from xlstm_kernels.triton.window import window_triton

pytestmark = pytest.mark.usefixtures("poisoned")
BOUND = 1e-5
SMALL = WindowConfig(16, 4, 1, 4, 1, 4, 16)  # blocks of 16 tokens


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
    """Compare outputs and gradients with the reference, each row of the batch on its own."""
    scale = inputs["q"].shape[-1] ** -0.5
    settings = {"window": window, "sinks": sinks, "segment_ids": ids}
    found = outputs_and_grads(
        lambda **x: window_triton(**x, **settings, scale=scale, config=SMALL), inputs
    )
    truth = outputs_and_grads(
        lambda **x: sliding_window_reference(**x, **settings), to_float64(inputs)
    )
    for name in truth:
        for row, (actual, expected) in enumerate(zip(found[name], truth[name], strict=True)):
            if expected.any():
                assert error_ratio(actual, expected) < bound, (name, row)
            else:  # each query sees one key: dq and dk are exactly 0 in the reference
                assert actual.abs().max() < bound, (name, row)


# Three blocks. Windows of one token, of a part of a block, of a block, of more, and of more than
# all; sinks fewer and more than the window. With documents (a compile-time switch): two heads.
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 3), (16, 4), (17, 20), (100, 2)])
def test_outputs_and_all_gradients_match_reference(
    device: str, window: int, sinks: int, documents: bool
) -> None:
    ids = random_segments(1, 37, mean_length=15, seed=window).to(device) if documents else None
    heads = 2 if documents else 1
    assert_matches(random_qkv(device, 1, heads, 1, 37, seed=window), window, sinks, ids)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_any_length_matches_reference(device: str, tokens: int) -> None:
    assert_matches(random_qkv(device, 1, 1, 1, tokens, seed=tokens), 4, 2)


# One row each: documents that end at the borders of blocks, next to them and inside, and a long one
# whose sinks more blocks read than the sinks' kernels take at once (two, with seven sinks).
DOCUMENTS = [[16, 32, 22], [15, 1, 16, 38], [2, 1, 67]]


# A window shorter than a block, whose sinks are summed over two blocks first; and one that holds
# whole blocks of the longer documents.
@pytest.mark.parametrize(("window", "sinks"), [(7, 7), (40, 3)])
def test_documents_match_reference(
    device: str, monkeypatch: pytest.MonkeyPatch, window: int, sinks: int
) -> None:
    monkeypatch.setattr(triton_window, "SINK_RUN", 2)
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS]
    ids = torch.stack(rows).to(device)
    assert_matches(random_qkv(device, len(rows), 2, 1, 70, seed=1), window, sinks, ids)


def test_grouped_heads_match_reference(device: str) -> None:
    # Two groups of two heads; the second document's sinks lie before the band of the last block.
    ids = (torch.arange(40) >= 4).long().expand(2, -1).to(device)
    assert_matches(random_qkv(device, 2, 4, 2, 40, seed=1), 7, 4, ids)


# Measured in the interpreter: at most 3.9e-4.
def test_float16_loses_only_its_rounding(device: str) -> None:
    inputs = {
        n: x.detach().half().requires_grad_()
        for n, x in random_qkv(device, 1, 2, 1, 40, 32).items()
    }
    assert_matches(inputs, 20, 4, bound=6e-4)


def test_public_operator_runs_the_kernels_of_the_table(device: str) -> None:
    inputs = random_qkv(device, 1, 2, 1, 40, 32, seed=3)
    strided = {
        n: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for n, x in inputs.items()
    }
    ids = random_segments(1, 40, mean_length=20, seed=4).to(device)
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
