"""Merge experts by a weighted sum: pure functions over tensors of the same name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xlstm_distill.errors import UserError
from xlstm_distill.recipe.fields import SUM_TOLERANCE


def check_weights(weights: Mapping[str, float]) -> None:
    """Check that the experts' weights are non-negative and sum to one (paper, Eq. 14).

    With any other sum, every weight of the merged model is scaled, and it collapses.

    Raises:
        UserError: a weight is negative or not finite, or the sum is not 1.
    """
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise UserError(
                f"merge.weights.{name}: {weight} is not allowed; a weight is at least 0."
            )
    # Not `sum`: it rounds after each term, and 0.1 * 10 would not be 1.
    total = math.fsum(weights.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise UserError(f"merge.weights: they sum to {total:.6g}, not 1; divide each by the sum.")


def merge_linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum one tensor over the experts, θ = Σ λ_i θ_i, in float64 (paper, Eq. 14).

    A tensor that is equal in all experts is copied, so that frozen weights stay bit-identical.
    """
    first = tensors[0]
    if all(torch.equal(first, other) for other in tensors[1:]):
        return first.clone()
    # In float64: a bf16 sum would be rounded once for each expert.
    total = torch.zeros_like(first, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(torch.float64), alpha=weight)
    return total.to(first.dtype)


def merge_state_dicts(
    experts: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Merge the experts' weights by name; `weights` has a weight for each expert.

    Raises:
        UserError: the weights are not allowed, or a tensor is missing in an expert or has another
            shape.
    """
    check_weights(weights)
    names = list(experts)
    first = experts[names[0]]
    for name in names[1:]:
        _check_same(names[0], first, name, experts[name])
    factors = [weights[name] for name in names]
    # Read tensor by tensor: experts that are mapped files never are in memory as a whole.
    merged = {}
    for key in first:
        tensors = [experts[name][key] for name in names]
        merged[key] = merge_linear(tensors, factors)
    return merged


def _check_same(
    name: str, first: Mapping[str, Tensor], other_name: str, other: Mapping[str, Tensor]
) -> None:
    """Refuse experts that differ in a tensor's name or shape."""
    for key in sorted({*first, *other}):
        if key in first and key in other and first[key].shape == other[key].shape:
            continue
        raise UserError(
            f"merge: experts differ in {key}: {name!r} has {_shape(first.get(key))}, "
            f"{other_name!r} has {_shape(other.get(key))}; merge experts that were distilled from "
            "one student."
        )


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"shape {tuple(tensor.shape)}"
