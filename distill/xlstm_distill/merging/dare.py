"""DARE: keep random differences and scale them up (arXiv 2311.03099)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

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
    return torch.cat(list(masks(seed, expert, block, density)))


def masks(seed: int, expert: str, block: Block, density: float) -> Iterator[Tensor]:
    """Draw a block's mask piece by piece."""
    # Philox is keyed, so that each block has numbers of its own, in whatever order they are drawn.
    name = f"{seed}\0{expert}\0{block.name}\0{block.number}".encode()
    key = np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8")
    philox = np.random.Philox(key=key)
    # Compared as whole numbers: rounding to float32 would shift the probability.
    below = min(round(density * WORDS), WORDS)
    for piece in block.pieces():
        count = piece.stop - piece.start
        # Each word is two numbers, the lower half first, as `Generator.integers` takes them; it
        # needs twice the time.
        words = philox.random_raw((count + 1) // 2)
        drawn = words.astype("<u8", copy=False).view("<u4")[:count]
        yield torch.from_numpy(drawn < below)
