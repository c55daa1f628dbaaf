"""The window of long rows on a CPU, tile after tile, against its per-query float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xlstm_kernels import sliding_window_attention
from xlstm_kernels.reference import sliding_window_reference
from xlstm_kernels.testing import allocated_peak, error_ratio, outputs_and_grads, to_float64
from xlstm_kernels.torch import tiles
from xlstm_kernels.torch.tiles import Plan, tiled_attention

Inputs = dict[str, Tensor]


def random_qkv(B: int, H: int, G: int, T: int, D: int, seed: int = 0) -> Inputs:
    """Draw leaves whose memory lies as a projection leaves it, (B, T, H, D)."""
    draw = torch.Generator().manual_seed(seed)
    heads = {"q": H, "k": G, "v": G}
    rows = {n: torch.randn(B, T, h, D, generator=draw).transpose(1, 2) for n, h in heads.items()}
    return {name: x.requires_grad_() for name, x in rows.items()}


def errors(inputs: Inputs, window: int, sinks: int) -> dict[str, float]:
    settings: dict[str, Any] = {"window": window, "sinks": sinks}
    scale = inputs["q"].shape[-1] ** -0.5
    actual = outputs_and_grads(lambda **x: tiled_attention(**x, **settings, scale=scale), inputs)
    exact = to_float64(inputs)
    expected = outputs_and_grads(lambda **x: sliding_window_reference(**x, **settings), exact)
    assert all(actual[name].dtype == inputs["q"].dtype for name in actual)
    return {name: error_ratio(actual[name], expected[name]) for name in expected}


# A window of no whole tiles; twice the window and a bit more; a row within the window; sinks that
# lie inside of the first bands; more of them than the window has tokens; no sinks.
@pytest.mark.parametrize(
    ("shape", "window", "sinks"),
    [
        ((2, 4, 2, 300, 16), 70, 3),
        ((1, 8, 8, 129, 24), 64, 4),
        ((3, 4, 1, 129, 8), 64, 40),
        ((2, 2, 2, 200, 8), 33, 90),
        ((1, 8, 2, 514, 16), 512, 4),
        ((1, 2, 1, 50, 8), 64, 4),
        ((2, 2, 1, 700, 8), 256, 0),
        ((1, 2, 1, 90, 8), 5, 9),
    ],
)
def test_outputs_and_all_gradients_match_reference(
    shape: tuple[int, int, int, int, int], window: int, sinks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_qkv(*shape, seed=window)
    together = errors(inputs, window, sinks)
    assert max(together.values()) < 1e-5, together
    monkeypatch.setattr(tiles, "SCORES_AT_ONCE", 1)  # head after head
    alone = errors(inputs, window, sinks)
    assert max(alone.values()) < 1e-5, alone


# Measured: at most 2.4e-3, 3.0e-4 and 6e-16.
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 3.5e-3), (torch.float16, 5e-4), (torch.float64, 1e-14)]
)
def test_other_dtypes_stay_near_reference(dtype: torch.dtype, bound: float) -> None:
    inputs = random_qkv(2, 4, 2, 200, 32)
    narrow = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    found = errors(narrow, 70, 4)
    assert max(found.values()) < bound, found


def heavy(T: int = 160) -> tuple[Inputs, dict[str, int]]:
    """Return inputs and settings of a call that tiles serve."""
    return random_qkv(2, 8, 8, T, 64), {"window": 96, "sinks": 4}


def operator_of(out: Tensor) -> str:
    assert out.grad_fn is not None
    return out.grad_fn.name()


def test_tiles_serve_long_rows_of_large_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, settings = heavy()
    out = sliding_window_attention(**inputs, **settings)
    assert "window_tiles" in operator_of(out)
    ids = torch.zeros(2, 160, dtype=torch.int64)
    small = {name: x[:, :2, :, :32] for name, x in inputs.items()}
    within = {name: x[:, :, :64] for name, x in inputs.items()}
    banded = sliding_window_attention(**inputs, **settings, segment_ids=ids)
    for other in (
        banded,
        sliding_window_attention(**inputs, **settings, softcap=5.0),
        sliding_window_attention(**small, **settings),
        sliding_window_attention(**within, **settings),
    ):
        assert "window_tiles" not in operator_of(other)
    assert error_ratio(out, banded) < 2e-6
    # Two threads wait for each other too often in tiles of this size.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "window_tiles" not in operator_of(sliding_window_attention(**inputs, **settings))


@pytest.mark.parametrize("window", [128, 256, 512])
def test_twice_the_window_multiplies_fewer_pairs_than_causal_attention(window: int) -> None:
    T = 2 * window
    q = torch.empty(1, 8, T, 64)
    plan = Plan(q, q, window, 4, buffers=0)
    pairs = sum((t.end - t.first) * (t.end - t.low + t.sinks) for t in plan.tiles)
    assert pairs < 0.96 * T * (T + 1) / 2


def test_rows_of_a_batch_are_as_alone_and_nothing_but_inputs_is_kept() -> None:
    inputs, settings = heavy()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = sliding_window_attention(**inputs, **settings)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in inputs.values()]
    for row in range(2):
        alone = {name: x[row : row + 1] for name, x in inputs.items()}
        assert torch.equal(sliding_window_attention(**alone, **settings)[0], out[row])


def test_memory_is_linear_in_tokens() -> None:
    def memory(tokens: int) -> int:
        inputs, settings = heavy(tokens)
        return allocated_peak(
            lambda: sliding_window_attention(**inputs, **settings).sum().backward()
        )

    short, long = memory(512), memory(2048)
    assert long < 4.1 * short


def test_autocast_and_compilers_change_nothing_and_a_second_derivative_raises() -> None:
    inputs, settings = heavy()
    plain = sliding_window_attention(**inputs, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sliding_window_attention(**inputs, **settings), plain)
    compiled = torch.compile(sliding_window_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs, **settings), plain)
    meta = {name: x.detach().to("meta") for name, x in inputs.items()}
    scale = 64**-0.5
    assert tiled_attention(**meta, **settings, scale=scale).stride() == plain.stride()
    (grad,) = torch.autograd.grad(plain.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^sliding_window_attention: second derivatives"):
        grad.sum().backward()
