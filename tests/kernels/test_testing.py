"""The tools of the other tests see what they must see."""

from __future__ import annotations

import pytest
import torch

from xlstm_kernels.testing import error_ratio, random_segments


def test_error_ratio_sees_errors_and_nan() -> None:
    x = torch.tensor([3.0, 4.0])
    assert error_ratio(x, x) == 0.0
    assert error_ratio(x + torch.tensor([0.3, 0.4]), x) == pytest.approx(0.1)
    assert error_ratio(torch.ones(2), torch.zeros(2)) == float("inf")
    assert not error_ratio(torch.tensor([float("nan"), 1.0]), x) < 1e9
    with pytest.raises(ValueError, match=r"actual has shape \(2,\), expected \(3,\)"):
        error_ratio(x, torch.zeros(3))


def test_random_segments_are_documents_in_order() -> None:
    ids = random_segments(3, 400, mean_length=20, seed=0)
    assert ids.shape == (3, 400)
    assert set(ids.diff(dim=1).unique().tolist()) == {0, 1}
    assert 5 <= int(ids.max()) <= 60
