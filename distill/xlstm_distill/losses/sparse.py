"""The teacher's distribution at the kept tokens, stored as its most likely tokens and a tail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's distribution at K kept tokens: its most likely tokens, the rest as one mass.

    ids (K, k) int64; log_probs (K, k) fp32, natural logarithms of the full distribution; tail
    (K,) fp32, the mass of all other tokens. Rows that keep fewer than k tokens are padded: padded
    entries have log_probs -inf and id 0, and carry no mass. A row's first entry is never padding.
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
        # Rounding can bring the sum of the kept probabilities above 1.
        tail = (1 - log_probs.exp().sum(dim=-1)).clamp_min(0)
        return cls(ids, log_probs, tail)

    def rows(self, piece: slice) -> SparseTargets:
        """Take the targets of some of the K tokens."""
        return SparseTargets(self.ids[piece], self.log_probs[piece], self.tail[piece])

    def keep_mass(
        self, mass: float | None, min_k: int = 1, *, narrow: bool = True
    ) -> SparseTargets:
        """Keep in each row the fewest tokens that hold `mass` of the full distribution.

        At least `min_k` tokens stay. The entries of a row must be sorted, most likely first. With
        None, or where the row's entries hold less than `mass`, all of them stay. `narrow` cuts the
        tensors to the widest row, for which it waits for the device.
        """
        if mass is None:
            return self
        probs = self.log_probs.double().exp()
        # Mass of the entries before each one: an entry is wanted while that is not yet enough.
        before = probs.cumsum(dim=-1) - probs
        wanted = torch.arange(probs.shape[-1], device=probs.device) < min_k
        # Rounding may bring `before` to 1 too early, hence the case of its own for `mass` 1.
        keep = ((before < mass) | wanted | (mass >= 1)) & (probs > 0)
        width = probs.shape[-1]
        if narrow:
            width = int(keep.sum(dim=-1).max()) if len(keep) else 0
        dropped = probs.masked_fill(keep, 0).sum(dim=-1)
        return SparseTargets(
            self.ids.masked_fill(~keep, 0)[:, :width],
            self.log_probs.masked_fill(~keep, -math.inf)[:, :width],
            (self.tail.double() + dropped).float(),
        )
