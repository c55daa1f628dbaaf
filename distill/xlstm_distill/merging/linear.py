"""Weighted sums of experts: pure functions of blocks of one tensor, all of shape (N,).

Sums are taken in the next wider format: float32 for half precision, float64 for float32.
"""

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


def wide(dtype: torch.dtype) -> torch.dtype:
    """The format in which sums of such numbers are taken."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum one tensor over the experts, θ = Σ λ_i θ_i (paper, Eq. 14).

    A number that is equal in all experts keeps its bits, in all formats but float64: weights are
    divided by their sum, and the wider sum rounds back to it. So frozen weights stay frozen.
    """
    first = tensors[0]
    whole = math.fsum(weights)
    # A product and not zeros: 0 + -0 would lose the sign.
    total = first.to(wide(first.dtype), copy=True).mul_(weights[0] / whole)
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight / whole)
    return total.to(first.dtype)


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], scale: float
) -> Tensor:
    """Add the weighted differences to the seed student: θ = θ(0) + s Σ λ_i (θ_i - θ(0)).

    Source: task arithmetic, arXiv 2212.04089. With scale 1 it is the weighted sum, up to rounding.
    """
    dtype = tensors[0].dtype
    start = base.to(wide(dtype))
    total = torch.zeros_like(start)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor - start, alpha=weight)
    return torch.add(start, total, alpha=scale).to(dtype)
