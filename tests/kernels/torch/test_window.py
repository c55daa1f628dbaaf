"""Sliding-window attention with sinks against its per-query float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels import sliding_window_attention
from xlstm_kernels.reference import sliding_window_reference
from xlstm_kernels.testing import (
    allocated_peak,
    error_ratio,
    outputs_and_grads,
    random_segments,
    to_float64,
)
from xlstm_kernels.torch import window_cpu
from xlstm_kernels.torch.window import Bands, _attention_grads, _blocks, _join, _unband, forward

BOUND = 1e-5


def random_qkv(B: int, H: int, G: int, T: int, D: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(B, h, T, D, generator=draw).requires_grad_()
        for n, h in (("q", H), ("k", G), ("v", G))
    }


def assert_matches_reference(
    inputs: dict[str, Tensor], window: int, sinks: int, ids: Tensor | None = None
) -> None:
    settings = {"window": window, "sinks": sinks, "segment_ids": ids}
    actual = outputs_and_grads(lambda **x: sliding_window_attention(**x, **settings), inputs)
    expected = outputs_and_grads(
        lambda **x: sliding_window_reference(**x, **settings), to_float64(inputs)
    )
    for name in expected:
        if expected[name].any():
            assert error_ratio(actual[name], expected[name]) < BOUND, name
        else:  # each query sees one key: dq and dk are exactly 0 in the reference
            assert actual[name].abs().max() < BOUND, name


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("window", "sinks"),
    [(1, 0), (1, 2), (5, 0), (5, 3), (31, 4), (32, 4), (33, 40), (64, 1), (300, 4)],
)
def test_outputs_and_all_gradients_match_reference(
    window: int, sinks: int, documents: bool
) -> None:
    ids = random_segments(2, 101, mean_length=15, seed=window) if documents else None
    assert_matches_reference(random_qkv(2, 2, 1, 101, 8, seed=window), window, sinks, ids)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 63, 64, 65])
def test_any_length_matches_reference(tokens: int) -> None:
    ids = random_segments(2, tokens, mean_length=40, seed=tokens)
    assert_matches_reference(random_qkv(2, 2, 2, tokens, 8, seed=tokens), 8, 2, ids)


def test_a_thousand_tokens_match_reference() -> None:
    assert_matches_reference(
        random_qkv(1, 2, 1, 1000, 16), 48, 4, random_segments(1, 1000, mean_length=200, seed=1)
    )


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (6, 3)])
def test_grouped_heads_match_reference(heads: int, groups: int) -> None:
    assert_matches_reference(random_qkv(2, heads, groups, 70, 8, seed=heads), 12, 3)


# Blocks hold 32 queries here: documents that start or end at their borders, next to them, and far
# inside.
@pytest.mark.parametrize(
    "lengths", [[32, 64, 32], [31, 1, 33, 63], [64, 64], [2, 1, 125], [100, 3, 25], [16, 16, 96]]
)
@pytest.mark.parametrize(("window", "sinks"), [(8, 4), (32, 4), (20, 0)])
def test_packed_documents_equal_separate_ones(lengths: list[int], window: int, sinks: int) -> None:
    inputs = random_qkv(1, 4, 2, sum(lengths), 8, seed=len(lengths))
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]

    def separately(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat(
            [sliding_window_attention(*p, window=window, sinks=sinks) for p in parts], dim=2
        )

    packed = outputs_and_grads(
        lambda **x: sliding_window_attention(**x, window=window, sinks=sinks, segment_ids=ids),
        inputs,
    )
    expected = outputs_and_grads(separately, inputs)
    for name in expected:
        assert error_ratio(packed[name], expected[name]) < 2e-6, name


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_window_over_everything_is_causal_attention(sinks: int) -> None:
    q, k, v = random_qkv(2, 4, 4, 90, 16).values()
    actual = sliding_window_attention(q, k, v, window=90, sinks=sinks)
    assert error_ratio(actual, F.scaled_dot_product_attention(q, k, v, is_causal=True)) < 2e-6


def test_documents_that_a_window_holds_whole_take_no_copies_of_all_keys() -> None:
    def memory(tokens: int) -> int:
        q, k, v = (x.detach() for x in random_qkv(1, 2, 1, tokens, 16).values())
        ids = random_segments(1, tokens, mean_length=300)
        settings = {"window": tokens, "sinks": 2, "segment_ids": ids}
        return allocated_peak(lambda: sliding_window_attention(q, k, v, **settings))

    assert_matches_reference(
        random_qkv(1, 2, 1, 600, 8), 600, 2, random_segments(1, 600, mean_length=150)
    )
    # Scores of a block grow with the tokens, and nothing with their square.
    assert memory(4096) < 2.5 * memory(2048)


def test_a_sink_beyond_the_window_is_seen_and_its_neighbour_is_not() -> None:
    q, k, v = (x.detach() for x in random_qkv(1, 1, 1, 200, 8).values())
    v = torch.zeros_like(v)
    v[..., 1, :], v[..., 2, :] = 1.0, 100.0  # token 1 is the last of two sinks
    last = sliding_window_attention(q, k, v, window=16, sinks=2)[0, 0, -1]
    scores = (k[0, 0] @ q[0, 0, -1]) / 8**0.5
    seen = torch.cat([scores[:2], scores[-16:]])
    assert torch.allclose(last, seen.softmax(dim=0)[1].expand(8), atol=1e-6)


def test_scale_is_the_factor_of_the_scores() -> None:
    q, k, v = random_qkv(1, 2, 2, 40, 16).values()
    default = sliding_window_attention(q, k, v, window=8, sinks=1)
    assert torch.equal(sliding_window_attention(q, k, v, window=8, sinks=1, scale=0.25), default)
    doubled = sliding_window_attention(2 * q, k, v, window=8, sinks=1, scale=0.125)
    assert error_ratio(doubled, default) < 2e-6
    assert (
        error_ratio(sliding_window_attention(q, k, v, window=8, sinks=1, scale=1.0), default) > 0.01
    )


# Measured at this shape: at most 3.7e-3 (bfloat16) and 4.6e-4 (float16).
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
def test_low_precision_stays_near_reference(dtype: torch.dtype, bound: float) -> None:
    inputs = {
        n: x.detach().to(dtype).requires_grad_() for n, x in random_qkv(2, 4, 2, 200, 32).items()
    }
    actual = outputs_and_grads(
        lambda **x: sliding_window_attention(**x, window=32, sinks=4), inputs
    )
    expected = outputs_and_grads(
        lambda **x: sliding_window_reference(**x, window=32, sinks=4), to_float64(inputs)
    )
    assert actual["h"].dtype == dtype
    for name in expected:
        assert error_ratio(actual[name], expected[name]) < bound, name


# Measured in bfloat16: 2.6e-3 to 5.1e-3 with scores eight times as large as those of random rows.
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 6e-3), (torch.float32, BOUND), (torch.float64, 1e-12)]
)
def test_the_gradient_of_other_devices_matches_reference(dtype: torch.dtype, bound: float) -> None:
    """What runs where torch has no fused backward pass for CPUs, called by its parts."""
    draw = torch.Generator().manual_seed(0)
    H, G, T, D, W = 4, 2, 200, 32, 48
    q, k, v, dout = (torch.randn(1, h, T, D, generator=draw) for h in (H, G, G, H))
    inputs = {"q": (8 * q).to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    dout, ids = dout.to(dtype), random_segments(1, T, mean_length=50)
    exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
    out = sliding_window_reference(**exact, window=W, sinks=3, segment_ids=ids)
    expected = torch.autograd.grad(out, list(exact.values()), dout.double())
    bands = Bands.of(**inputs, segment_ids=ids, window=W, sinks=3)
    blocks = (_blocks(x, G, bands.length) for x in (dout, out.detach().to(dtype)))
    dq, dk, dv = _attention_grads(bands, *blocks, D**-0.5)
    k, v = inputs["k"], inputs["v"]
    found = (_join(dq, inputs["q"], bands.length), _unband(dk, bands, k), _unband(dv, bands, v))
    for name, mine, theirs in zip(exact, found, expected, strict=True):
        assert mine.dtype == dtype
        assert error_ratio(mine, theirs) < bound, name


def test_strided_inputs_give_the_same_result() -> None:
    inputs = random_qkv(2, 2, 2, 50, 8)
    strided = {
        n: x.detach().transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()
    }
    assert not strided["q"].is_contiguous()
    plain = sliding_window_attention(**inputs, window=8, sinks=2)
    assert error_ratio(sliding_window_attention(**strided, window=8, sinks=2), plain) < 1e-6


def test_autocast_keeps_the_dtype_of_the_queries() -> None:
    inputs = random_qkv(1, 2, 1, 50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sliding_window_attention(**inputs, window=8, sinks=2)
    assert out.dtype == torch.float32
    assert error_ratio(out, sliding_window_attention(**inputs, window=8, sinks=2)) < 1e-2


def test_windows_beyond_the_row_do_not_share_a_plan() -> None:
    # As exported programs call it. Their bands are alike in a row this short, their blocks are not.
    inputs = random_qkv(1, 2, 2, 70, 8)
    settings = {"window": 70, "sinks": 2}
    exact = sliding_window_reference(**to_float64(inputs), **settings)
    for width in (512, 100):
        q, k, v = inputs.values()
        out, _ = forward(q, k, v, None, width, 2, 8**-0.5)
        assert error_ratio(out, exact) < BOUND


# One block at a time, a few of a row, some rows. Documents longer and shorter than the window.
@pytest.mark.parametrize("at_once", [1, 1 << 14, 1 << 17])
@pytest.mark.parametrize(("heads", "window", "length"), [(2, 100, 30), (1, 24, 200), (2, 9, 60)])
def test_parts_of_any_size_match_reference(
    heads: int, window: int, length: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_cpu, "NUMBERS_AT_ONCE", at_once)
    ids = random_segments(3, 210, mean_length=length, seed=window)
    assert_matches_reference(random_qkv(3, 2 * heads, 2, 210, 8, seed=at_once), window, 3, ids)


def test_keys_that_no_query_of_a_part_sees_are_not_read() -> None:
    ids = torch.arange(4).repeat_interleave(256)[None]
    q = torch.zeros(1, 2, 1024, 64)
    work = window_cpu.Work(q, q, ids, 700, 4)
    # Blocks hold 64 queries. The first of a document read nothing before it, the last 192 tokens.
    read = [work.back - part.skip for part in work.parts()]
    assert read == [0, 64, 128, 192] * 4


def test_documents_may_change_in_place_and_plans_kept_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, ids = random_qkv(2, 4, 2, 70, 8), random_segments(2, 70, mean_length=20)
    settings = {"window": 9, "sinks": 2}
    monkeypatch.setattr(window_cpu._plans, "kept", ())
    assert_matches_reference(inputs, 9, 2, ids)
    assert_matches_reference(inputs, 9, 2, ids.clone())
    assert len(window_cpu._plans.kept) == 1
    assert_matches_reference(inputs, 9, 2, ids.int())
    out = sliding_window_attention(**inputs, **settings, segment_ids=ids)
    before = ids.clone()
    ids.data[:] = random_segments(2, 70, mean_length=20, seed=1)  # its version stays the same
    assert_matches_reference(inputs, 9, 2, ids)
    exact = sliding_window_reference(**to_float64(inputs), **settings, segment_ids=before)
    assert error_ratio(out, exact) < BOUND
    for seed in range(6):
        ids = random_segments(2, 70, mean_length=20, seed=seed)
        sliding_window_attention(**inputs, **settings, segment_ids=ids)
    assert len(window_cpu._plans.kept) == window_cpu.PLANS
    monkeypatch.setattr(window_cpu, "PLAN_AT_MOST", 1)
    monkeypatch.setattr(window_cpu._plans, "kept", ())
    assert_matches_reference(inputs, 9, 2, ids)
    assert not window_cpu._plans.kept


def test_a_broken_row_leaves_the_others_alone() -> None:
    inputs = {name: x.detach() for name, x in random_qkv(3, 2, 2, 50, 8).items()}
    sound = sliding_window_attention(**inputs, window=9, sinks=2)
    for x in inputs.values():
        x[1] = torch.nan
    broken = sliding_window_attention(**inputs, window=9, sinks=2)
    assert broken[1].isnan().all()
    assert torch.equal(broken[::2], sound[::2])


def test_a_plan_that_is_kept_serves_training_too() -> None:
    """The first call is in inference mode; more heads share a key in the last."""
    for heads in (2, 2, 4):
        inputs = random_qkv(1, heads, 2, 150, 8, seed=heads)
        with torch.inference_mode():
            alone = sliding_window_attention(**inputs, window=9, sinks=2)
        assert torch.equal(sliding_window_attention(**inputs, window=9, sinks=2), alone)
        assert_matches_reference(inputs, 9, 2)
