"""Full causal attention inside documents, without a mask of T x T numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

QUERIES = 512
"""Queries of a block: the mask of one is all of it that exists at once."""
FEWEST_QUERIES, MASK_SIZE = 128, 1 << 26
"""A block has fewer queries, down to this many, where its mask would have more numbers."""


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segments: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Let T queries attend to S keys, of which the last T are their own: (B, H, T, D).

    q (B, H, T, D), k and v (B, G, S, D). segments: documents of the queries (B, T) and of the keys
    (B, S), which decide what is seen besides causality; None: nothing else does.

    Documents need a mask, which SDPA takes whole. So queries come in blocks, and a backward pass
    makes each block's mask, and its scores, again: memory is linear in S.
    """
    tokens = q.shape[2]
    if segments is None and tokens == k.shape[2]:
        # The kernel that needs no mask (flash), as the teacher calls it.
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    size = _block(q, k)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    before, parts = k.shape[2] - tokens, []
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        seen = before + end
        part = None
        if segments is not None:
            part = segments[0][:, start:end], segments[1][:, :seen]
        given = (q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], scale, part)
        if recorded:
            parts.append(checkpoint(_attend, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend(*given))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _block(q: Tensor, k: Tensor) -> int:
    """Return the queries of a block."""
    per_query = q.shape[0] * (q.shape[1] // k.shape[1]) * k.shape[2]
    return int(min(QUERIES, max(FEWEST_QUERIES, MASK_SIZE // per_query)))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segments: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attend as `full_attention` does, with one mask."""
    batch, heads, tokens, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    shared = heads // groups
    mask = None
    if tokens > 1 or segments is not None:
        mask = _visible(tokens, keys, segments, q.device)
    if shared > 1:
        # Queries of a group are further queries of its head: kernels that take a mask would want
        # keys and values repeated for each.
        q = q.reshape(batch, groups, shared * tokens, dim)
        if mask is not None and tokens > 1:
            mask = mask.repeat(1, 1, shared, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return mixed.reshape(batch, heads, tokens, v.shape[-1])


def _visible(
    tokens: int, keys: int, segments: tuple[Tensor, Tensor] | None, device: torch.device
) -> Tensor:
    """Tell which of S keys each of the last T tokens sees, (B or 1, 1, T, S) bool."""
    if tokens == 1:
        assert segments is not None
        return (segments[1] == segments[0])[:, None, None]
    place = torch.arange(keys, device=device)
    seen = (place <= place[keys - tokens :, None])[None]
    if segments is not None:
        seen = seen & (segments[0][:, :, None] == segments[1][:, None, :])
    return seen[:, None]
