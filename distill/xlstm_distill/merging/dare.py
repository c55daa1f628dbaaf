"""DARE: keep random differences and scale them up (arXiv 2311.03099)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xlstm_distill.merging.linear import wide
from xlstm_distill.merging.streaming import Block

WORDS = 2**32


def dare(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    scale: float,
    masks: Sequence[Tensor],
    density: float,
) -> Tensor:
    """Merge a block: θ = θ(0) + s Σ λ_i m_i (θ_i - θ(0)) / density.

    `masks` say which differences of each expert are kept (`mask`). Dividing by the density keeps
    their expected sum.
    """
    dtype = tensors[0].dtype
    start = base.to(wide(dtype))
    total = torch.zeros_like(start)
    for tensor, weight, mask in zip(tensors, weights, masks, strict=True):
        total.add_((tensor - start).mul_(mask), alpha=weight / density)
    return torch.add(start, total, alpha=scale).to(dtype)


def mask(seed: int, expert: str, block: Block, density: float) -> Tensor:
    """Draw which numbers of a block are kept, each with probability `density`: (N,) of bool.

    It depends on the seed, the names and the place in the tensor alone.
    """
    # Philox is keyed, so that each block has numbers of its own, in whatever order they are drawn.
    words = f"{seed}\0{expert}\0{block.name}\0{block.number}".encode()
    key = np.frombuffer(hashlib.sha256(words).digest()[:16], dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=key))
    count = block.stop - block.start
    drawn = generator.integers(0, WORDS, count, dtype=np.uint32)
    # Compared as whole numbers: rounding to float32 would shift the probability.
    return torch.from_numpy(drawn < min(round(density * WORDS), WORDS))
