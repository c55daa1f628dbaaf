"""TIES: trim the differences, elect a sign, average those that agree (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xlstm_distill.merging.linear import wide
from xlstm_distill.merging.selection import differences


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    scale: float,
    cuts: Sequence[float],
) -> Tensor:
    """Merge a block: θ = θ(0) + s · mean of the differences whose sign won.

    Of each expert's differences those below its `cuts`, over the whole tensor, are left out. The
    sign of their weighted sum wins. The mean is weighted too, over the experts that agree.
    """
    dtype = tensors[0].dtype
    start = base.to(wide(dtype))
    trimmed = []
    for tensor, cut in zip(tensors, cuts, strict=True):
        # As the cut was found: float32's order, whatever the sums' format.
        small = differences(tensor, base) < cut
        trimmed.append((tensor - start).masked_fill_(small, 0))
    elected = torch.zeros_like(start)
    for difference, weight in zip(trimmed, weights, strict=True):
        elected.add_(difference, alpha=weight)
    elected.sign_()
    total, mass = torch.zeros_like(start), torch.zeros_like(start)
    for difference, weight in zip(trimmed, weights, strict=True):
        # Where the sum is 0, and where a difference was trimmed, nothing agrees.
        agrees = difference * elected > 0
        total.add_(difference.mul_(agrees), alpha=weight)
        mass.add_(agrees, alpha=weight)
    mean = total.div_(mass.masked_fill_(mass == 0, 1))
    return torch.add(start, mean, alpha=scale).to(dtype)
