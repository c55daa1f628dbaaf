"""Exact sliding-window attention with sinks, in blocks of queries: linear in T for a fixed window.

Letters here, beyond the legend in `xlstm_kernels`: C blocks, L queries of a block, R = H / G query
heads of a group, span = L + W - 1 keys of a band.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.segments import document_runs, document_starts

# Queries of a block: as many as the window has tokens, between these bounds (docs/math.md, "Chunk
# size"). Smaller blocks make many small products; larger ones multiply more masked pairs.
BLOCK_MIN, BLOCK_MAX = 32, 128


class BandPlan(NamedTuple):
    """Which keys each block of queries reads.

    sinks (B or 1, C, N): positions of the sinks that are gathered for each block.
    bias (B or 1, C, L, N + span): 0 where the query sees the key, -inf elsewhere.
    """

    sinks: Tensor
    bias: Tensor


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    segment_ids: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend from each block of queries to its band of keys and to the sinks before the band.

    Shapes as in `xlstm_kernels.sliding_window_attention`, which checks the arguments. The band of a
    block is the block itself and the window - 1 tokens before it; a bias masks the keys of the band
    that a query does not see. Sinks before the band can only belong to one document, that of the
    band's first token: a later document starts inside the band. So each block gathers N more keys.
    """
    B, H, T, _ = q.shape
    G = k.shape[1]
    window = min(window, T)
    L = min(max(BLOCK_MIN, min(window, BLOCK_MAX)), T)
    plan = _plan(segment_ids, q.device, T, L, window, min(sinks, T))
    queries = F.pad(q, (0, 0, 0, -T % L)).unflatten(2, (-1, L)).unflatten(1, (G, -1))
    queries = queries.permute(0, 3, 1, 2, 4, 5)  # (B, C, G, R, L, D)
    queries = queries.flatten(3, 4).flatten(0, 1)  # (B * C, G, R * L, D)
    keys = _bands(k, plan.sinks, L, window - 1).to(q.dtype)
    values = _bands(v, plan.sinks, L, window - 1).to(q.dtype)
    bias = plan.bias[:, :, None].to(q.dtype).expand(B, -1, H // G, -1, -1)  # (B, C, R, L, keys)
    bias = bias.flatten(2, 3).flatten(0, 1).unsqueeze(1)  # (B * C, 1, R * L, keys)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
    out = out.unflatten(0, (B, -1)).unflatten(3, (-1, L))  # (B, C, G, R, L, D)
    out = out.permute(0, 2, 3, 1, 4, 5).reshape(B, H, -1, out.shape[-1])
    return out[:, :, :T].to(q.dtype)


def _bands(x: Tensor, sinks: Tensor, length: int, back: int) -> Tensor:
    """Collect what each block reads of keys or values: (B, G, T, D) -> (B * C, G, N + span, D).

    sinks (B or 1, C, N): positions of the sinks. length: L. back: tokens of a band before the
    block.
    """
    B, G, T, D = x.shape
    C, span = sinks.shape[1], back + length
    rows = sinks.expand(B, -1, -1).flatten(1)[:, None, :, None].expand(-1, G, -1, D)
    pieces = [x.gather(2, rows).unflatten(2, sinks.shape[1:])]  # (B, G, C, N, D)
    padded = F.pad(x, (0, 0, back, C * length - T))
    padded = F.pad(padded, (0, 0, 0, -padded.shape[2] % length))
    blocks = padded.unflatten(2, (-1, length))  # (B, G, C and more, L, D)
    # A band is a few blocks in a row. Tensor.unfold would do, but its gradient is slow on the CPU.
    for first in range(0, span, length):
        piece = blocks[:, :, first // length :][:, :, :C]
        pieces.append(piece[:, :, :, : span - first])
    return torch.cat(pieces, dim=3).transpose(1, 2).flatten(0, 1)


def _plan(
    segment_ids: Tensor | None, device: torch.device, T: int, L: int, window: int, sinks: int
) -> BandPlan:
    """Find the sinks and the bias of every block.

    Without segment_ids, one row serves the whole batch.
    """
    fill, back = -T % L, window - 1
    if segment_ids is None:
        segment_ids = torch.zeros(1, T, dtype=torch.int64, device=device)
    runs = document_runs(segment_ids)
    starts = document_starts(runs)  # (B, T)
    is_sink = torch.arange(T, device=device) - starts < sinks

    # Tokens before the row are in no document (-1). Those after it are in a document of their own
    # (T) and see each other: a row of the softmax without any key would be nan.
    runs_padded = F.pad(F.pad(runs, (back, 0), value=-1), (0, fill), value=T)
    query_runs = runs_padded[:, back:].unflatten(1, (-1, L))
    band_runs = runs_padded.unfold(1, back + L, L)  # (B, C, span)
    band_sinks = F.pad(is_sink, (back, fill)).unfold(1, back + L, L)
    t = torch.arange(L, device=device)[:, None]
    s = torch.arange(back + L, device=device) - back
    reachable = ((s <= t) & (t - s < window)) | ((s <= t) & band_sinks.unsqueeze(2))
    in_band = reachable & (query_runs.unsqueeze(3) == band_runs.unsqueeze(2))

    blocks = query_runs.shape[1]
    band_starts = torch.arange(blocks, device=device) * L - back  # (C,)
    first_token = band_starts.clamp(min=0)
    sink_positions = starts[:, first_token].unsqueeze(2) + torch.arange(sinks, device=device)
    before_band = sink_positions < band_starts[:, None]  # (B, C, N)
    band_documents = runs[:, first_token][:, :, None, None]
    in_sinks = before_band.unsqueeze(2) & (query_runs.unsqueeze(3) == band_documents)

    visible = torch.cat([in_sinks, in_band], dim=3)
    # A document may have fewer than N tokens before the band: masked, but its index must be valid.
    gathered = torch.minimum(sink_positions, first_token[:, None])
    return BandPlan(gathered, torch.where(visible, 0.0, -torch.inf))
