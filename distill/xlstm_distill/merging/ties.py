"""TIES: trim the differences, elect a sign, average those that agree (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xlstm_distill.merging.linear import wide


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
        trimmed.append(_trimmed(tensor, base, start, cut))
    elected = torch.zeros_like(start)
    for difference, weight in zip(trimmed, weights, strict=True):
        elected.add_(difference, alpha=weight)
    elected.sign_()
    total, mass = torch.zeros_like(start), torch.zeros_like(start)
    for difference, weight in zip(trimmed, weights, strict=True):
        # Magnitudes that agree; 0 where the sum is 0, and where a difference was trimmed.
        agreeing = difference.mul_(elected).relu_()
        total.add_(agreeing, alpha=weight)
        mass.add_(agreeing.sign_(), alpha=weight)
    mean = total.div_(mass.add_(mass == 0)).mul_(elected)
    return torch.add(start, mean, alpha=scale).to(dtype)


def _trimmed(tensor: Tensor, base: Tensor, start: Tensor, cut: float) -> Tensor:
    """Return the difference from the seed student, 0 where it is below the cut.

    `start` is the seed student in the format of the sums. Cuts were found in float32.
    """
    # `hardshrink` keeps what is above its bound. Booleans take several times as long on a CPU.
    below = float(np.nextafter(np.float32(cut), np.float32(0)))
    difference = tensor - start
    if difference.dtype == torch.float32:
        return torch.nn.functional.hardshrink(difference, below)
    kept = torch.nn.functional.hardshrink(tensor.float() - base.float(), below)
    return difference.mul_(kept.sign_().abs_())
