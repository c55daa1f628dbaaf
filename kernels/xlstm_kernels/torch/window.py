"""Exact sliding-window attention with sinks, in blocks of queries: linear in T for a fixed window."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.segments import document_runs, document_starts

BLOCK_MIN, BLOCK_MAX = 32, 128


class BandPlan(NamedTuple):
    """Which keys each block of queries reads.

    sinks (B or 1, C, N): positions of the sinks gathered for each block.
    bias (B or 1, C, L, N + span): 0 where the query sees the key, -inf elsewhere.
    """

    sinks: Tensor
    bias: Tensor


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    segment_ids: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend from each block of queries to its band of keys; shapes as in `xlstm_kernels.sliding_window_attention`.

    The band of a block is the block and the window - 1 tokens before it; sinks inside the band are found by the bias.
    Sinks before it can only be of one document, that of the band's first token (any later document starts inside the
    band), so each block gathers only `sinks` more keys. Letters: C blocks, L queries a block, N sinks, R = H / G.
    """
    B, H, T, _ = q.shape
    G = k.shape[1]
    window = min(window, T)
    L = min(max(BLOCK_MIN, min(window, BLOCK_MAX)), T)
    plan = _plan(segment_ids, q.device, T, L, window, min(sinks, T))
    queries = (
        F.pad(q, (0, 0, 0, -T % L)).unflatten(2, (-1, L)).unflatten(1, (G, -1))
    )  # (B, G, R, C, L, D)
    queries = queries.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).flatten(0, 1)  # (B * C, G, R * L, D)
    keys, values = (_bands(x, plan.sinks, L, window - 1).to(q.dtype) for x in (k, v))
    bias = (
        plan.bias[:, :, None].to(q.dtype).expand(B, -1, H // G, -1, -1).flatten(2, 3).flatten(0, 1)
    )
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=bias.unsqueeze(1), scale=scale
    )
    out = (
        out.unflatten(0, (B, -1)).unflatten(3, (-1, L)).permute(0, 2, 3, 1, 4, 5)
    )  # (B, G, R, C, L, D)
    return out.reshape(B, H, -1, out.shape[-1])[:, :, :T].to(q.dtype)


def _bands(x: Tensor, sinks: Tensor, length: int, back: int) -> Tensor:
    """Collect what each block reads of keys or values: x (B, G, T, D) -> (B * C, G, N + span, D)."""
    B, G, T, D = x.shape
    C, span = sinks.shape[1], back + length
    rows = sinks.expand(B, -1, -1).flatten(1)[:, None, :, None].expand(-1, G, -1, D)
    pieces = [x.gather(2, rows).unflatten(2, sinks.shape[1:])]  # (B, G, C, N, D)
    padded = F.pad(x, (0, 0, back, C * length - T))
    padded = F.pad(padded, (0, 0, 0, -padded.shape[2] % length)).unflatten(
        2, (-1, length)
    )  # (B, G, C + ..., L, D)
    for first in range(0, span, length):  # not unfold: its gradient is slow on the CPU
        piece = padded[:, :, first // length :][:, :, :C]
        pieces.append(piece[:, :, :, : span - first])
    return torch.cat(pieces, dim=3).transpose(1, 2).flatten(0, 1)


def _plan(
    segment_ids: Tensor | None, device: torch.device, T: int, L: int, window: int, sinks: int
) -> BandPlan:
    """Work out the sinks and the bias of every block; without segments one row serves the whole batch."""
    fill, back = -T % L, window - 1
    ids = (
        torch.zeros(1, T, dtype=torch.int64, device=device) if segment_ids is None else segment_ids
    )
    runs = document_runs(ids)
    first = document_starts(runs)  # (B, T)
    is_sink = torch.arange(T, device=device) - first < sinks
    # Tokens before the row are in no document (-1); those after it are in one of their own, and see each other.
    runs_padded = F.pad(F.pad(runs, (back, 0), value=-1), (0, fill), value=T)
    query_runs = runs_padded[:, back:].unflatten(1, (-1, L))
    band_runs = runs_padded.unfold(1, back + L, L)  # (B, C, span)
    band_sinks = F.pad(is_sink, (back, fill)).unfold(1, back + L, L)

    t, s = torch.arange(L, device=device)[:, None], torch.arange(back + L, device=device) - back
    reachable = ((s <= t) & (t - s < window)) | ((s <= t) & band_sinks.unsqueeze(2))
    in_band = reachable & (query_runs.unsqueeze(3) == band_runs.unsqueeze(2))

    starts = (
        torch.arange(query_runs.shape[1], device=device) * L - back
    )  # (C,) first position of each band
    at = starts.clamp(min=0)
    offsets = first[:, at].unsqueeze(2) + torch.arange(sinks, device=device)  # (B, C, N)
    before_band = offsets < starts[:, None]
    in_sinks = before_band.unsqueeze(2) & (query_runs.unsqueeze(3) == runs[:, at][:, :, None, None])
    visible = torch.cat([in_sinks, in_band], dim=3)
    return BandPlan(torch.minimum(offsets, at[:, None]), torch.where(visible, 0.0, -torch.inf))
