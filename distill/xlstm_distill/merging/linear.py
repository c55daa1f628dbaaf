"""Merge methods: pure functions over tensors of the same name in several experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xlstm_distill.errors import UserError

SUM_TOLERANCE = 1e-6


def check_weights(weights: Mapping[str, float]) -> None:
    """Check that merge weights are non-negative and sum to one (paper, Eq. 14); off that, a merged model collapses.

    Raises:
        UserError: a weight is negative or not finite, or the sum is not 1.
    """
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise UserError(
                f"merge.weights.{name}: {weight} is not allowed; a weight is at least 0."
            )
    total = math.fsum(weights.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise UserError(f"merge.weights: they sum to {total:.6g}, not 1; divide each by the sum.")


def merge_linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum of one tensor over the experts, θ = Σ λ_i θ_i, accumulated in float64 (paper, Eq. 14).

    A tensor equal in all experts is returned as it is, so that frozen weights stay bit-identical.
    """
    first = tensors[0]
    if all(torch.equal(first, other) for other in tensors[1:]):
        return first.clone()
    total = torch.zeros_like(first, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(torch.float64), alpha=weight)
    return total.to(first.dtype)


def merge_state_dicts(
    experts: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Merge the experts' weights by name.

    Raises:
        UserError: the weights are not a partition of one, or the experts differ in names or shapes of tensors.
    """
    check_weights(weights)
    names = list(experts)
    first = experts[names[0]]
    for name in names[1:]:
        shapes = {k: t.shape for k, t in experts[name].items()}
        if shapes != {k: t.shape for k, t in first.items()}:
            raise UserError(
                f"merge: experts {names[0]!r} and {name!r} differ in names or shapes of their weights."
            )
    return {
        key: merge_linear([experts[name][key] for name in names], [weights[name] for name in names])
        for key in first
    }
