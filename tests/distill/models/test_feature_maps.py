"""Feature maps against their formula, written out head by head in float64."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill.models.feature_maps import FeatureMap
from xlstm_kernels.testing import error_ratio


def stirred(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


@pytest.mark.parametrize("name", ["softmax", "hedgehog"])
@pytest.mark.parametrize("features", [3, 8, 12])
def test_feature_map_is_linear_then_softmax_per_query_head(name, features):
    phi = stirred(FeatureMap(heads=4, dim=8, features=features, name=name))
    x = torch.randn(2, 2, 5, 8)  # two groups
    out = phi(x)
    assert out.shape == (2, 4, 5, phi.out_features)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 4, 5))
    assert phi(x[:0]).shape == (0, 4, 5, phi.out_features)
    for head in range(4):
        mapped = x[:, head // 2].double() @ phi.weight[head].double().T
        parts = (
            [mapped.softmax(-1)]
            if name == "softmax"
            else [mapped.softmax(-1) / 2, (-mapped).softmax(-1) / 2]
        )
        torch.testing.assert_close(
            out[:, head].double(), torch.cat(parts, -1), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", ["softmax", "hedgehog"])
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_gradients_are_those_of_the_formula(name, spread):
    """Of a softmax that is nearly one number, too."""
    phi = stirred(FeatureMap(heads=4, dim=8, features=12, name=name))
    x = (torch.randn(2, 2, 5, 8) * spread).requires_grad_()
    back = torch.randn(2, 4, 5, phi.out_features)
    found = torch.autograd.grad(phi(x), (x, phi.weight), back)
    exact = [y.detach().double().requires_grad_() for y in (x, phi.weight)]
    mapped = torch.einsum("bhtd,hfd->bhtf", exact[0].repeat_interleave(2, dim=1), exact[1])
    truth = mapped.softmax(-1)
    if name == "hedgehog":
        truth = torch.cat([truth, (-mapped).softmax(-1)], dim=-1) / 2
    truths = torch.autograd.grad(truth, exact, back.double())
    for single, true in zip(found, truths, strict=True):
        assert error_ratio(single, true) < 1e-5


@pytest.mark.parametrize("features", [4, 8, 12])
def test_a_new_feature_map_is_the_identity_where_it_can_be(features):
    weight = FeatureMap(2, 8, features).weight
    shared = min(features, 8)
    assert torch.equal(weight[:, :shared], torch.eye(8)[:shared].expand(2, -1, -1))
