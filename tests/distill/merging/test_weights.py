"""Weights of a merge: refusal of those that would break a model."""

from __future__ import annotations

import pytest

from xlstm_distill.errors import UserError
from xlstm_distill.merging.linear import check_weights


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


def test_ten_tenths_are_one():
    check_weights({str(n): 0.1 for n in range(10)})
