"""Take heads out of a tensor of all heads, and put them together again."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_distill.models.attention.layout import LayerHeads, Runs


def take(x: Tensor, runs: Runs) -> Tensor:
    """Take heads of x (B, H, ...): a view where they are neighbours."""
    if len(runs) == 1:
        first, end = runs[0]
        return x if (first, end) == (0, x.shape[1]) else x[:, first:end]
    return torch.cat([x[:, first:end] for first, end in runs], dim=1)


def joined(heads: LayerHeads, full: Tensor | None, mixed: Tensor | None) -> Tensor:
    """Put outputs of the kept heads (B, K, ...) and of the mixer's (B, M, ...) in their order."""
    if full is None or mixed is None:
        only = mixed if full is None else full
        assert only is not None
        return only
    return take(torch.cat([full, mixed], dim=1), heads.order)
