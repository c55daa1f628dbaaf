"""Merging: exact weighted sums, and refusal of weights that would break a model."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill.errors import UserError
from xlstm_distill.merging.linear import check_weights, merge_linear, merge_state_dicts


def test_weighted_sum_is_exact_to_the_last_bit():
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    # Products with these weights are exact in float64, so the sum is rounded once, to float32.
    merged = merge_linear([a, b], [0.25, 0.75])
    assert torch.equal(merged, (0.25 * a.double() + 0.75 * b.double()).float())


def test_weighted_sum_has_the_precision_of_float64():
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # 0.3 and 0.7 are rounded: whether a CPU fuses product and sum decides the last bit.
    merged = merge_linear([a, b], [0.3, 0.7])
    torch.testing.assert_close(merged, 0.3 * a + 0.7 * b, rtol=1e-15, atol=1e-15)


def test_equal_tensors_stay_bit_identical():
    a = torch.randn(50)
    merged = merge_linear([a, a.clone(), a.clone()], [1 / 3] * 3)
    assert torch.equal(merged, a)
    assert merged.data_ptr() != a.data_ptr()


def test_merging_keeps_names_and_dtypes():
    experts = {
        name: {"w": torch.full((2,), x, dtype=torch.bfloat16)}
        for name, x in (("a", 1.0), ("b", 3.0))
    }
    merged = merge_state_dicts(experts, {"a": 0.5, "b": 0.5})
    assert merged["w"].dtype == torch.bfloat16
    assert merged["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.6, "b": 0.6}, r"merge.weights: they sum to 1.2, not 1"),
        ({"a": -0.5, "b": 1.5}, r"merge.weights.a: -0.5 is not allowed"),
        ({"a": float("nan"), "b": 1.0}, r"merge.weights.a: nan is not allowed"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        check_weights(weights)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": torch.ones(3)}, r"in w: 'a' has shape \(2,\), 'b' has shape \(3,\);"),
        ({}, r"in w: 'a' has shape \(2,\), 'b' has none;"),
        ({"w": torch.ones(2), "x": torch.ones(1)}, r"in x: 'a' has none, 'b' has shape \(1,\);"),
    ],
)
def test_experts_of_different_tensors_are_refused(other, message):
    with pytest.raises(UserError, match=message):
        merge_state_dicts({"a": {"w": torch.ones(2)}, "b": other}, {"a": 0.5, "b": 0.5})
