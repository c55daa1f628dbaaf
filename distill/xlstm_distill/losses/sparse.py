"""The teacher's distribution at the kept tokens: its most likely tokens and the mass of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's distribution at K kept tokens: its most likely tokens and the mass of all others.

    ids (K, k) int64; log_probs (K, k) fp32, natural logarithms of the full distribution; tail (K,) fp32. Padded
    entries, of rows that keep fewer than k tokens, have log_probs == -inf and ids 0; they carry no mass.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, top_k: int) -> SparseTargets:
        """Keep the top k of logits (K, V) of any dtype."""
        top = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        log_probs = top.values.float() - logits.float().logsumexp(dim=-1, keepdim=True)
        ids = top.indices.masked_fill(log_probs == -math.inf, 0)
        tail = (1 - log_probs.exp().sum(dim=-1)).clamp_min(0)
        return cls(ids, log_probs, tail)

    def keep_mass(self, mass: float | None, min_k: int = 1) -> SparseTargets:
        """Keep of each row the smallest set that holds `mass` of the full distribution, but `min_k` tokens at least.

        The rows are sorted. None, or a mass that they do not hold, keeps all of them.
        """
        if mass is None:
            return self
        probs = self.log_probs.double().exp()
        before = probs.cumsum(dim=-1) - probs
        wanted = torch.arange(probs.shape[-1], device=probs.device) < min_k
        keep = ((before < mass) | wanted | (mass >= 1)) & (probs > 0)
        width = int(keep.sum(dim=-1).max()) if len(keep) else 0
        dropped = probs.masked_fill(keep, 0).sum(dim=-1)
        return SparseTargets(
            self.ids.masked_fill(~keep, 0)[:, :width],
            self.log_probs.masked_fill(~keep, -math.inf)[:, :width],
            (self.tail.double() + dropped).float(),
        )
