"""Which keys each block of queries of the window reads, and which of them a query sees.

Letters here, beyond the legend in `xlstm_kernels`: C blocks, L queries of a block,
span = L + W - 1 keys of a band.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.segments import document_runs, document_starts


class BandPlan(NamedTuple):
    """Which keys each block of queries reads, its sinks and its band.

    sinks (B or 1, C, N): positions of the sinks that are gathered for each block.
    seen_sinks (B or 1, C, N, L), seen (B or 1, C, span, L) bool: whether the query sees the key.
    skip (B or 1, C): keys at a band's start that no query of the block sees.
    """

    sinks: Tensor
    seen_sinks: Tensor
    seen: Tensor
    skip: Tensor


def band_plan(
    segment_ids: Tensor | None, device: torch.device, T: int, L: int, window: int, sinks: int
) -> BandPlan:
    """Find what every block reads and sees.

    Without segment_ids, one row serves the whole batch.
    """
    C, back = -(-T // L), window - 1
    if segment_ids is None:
        starts = torch.zeros(1, T, dtype=torch.int64, device=device)
    else:
        starts = document_starts(document_runs(segment_ids))
    # Below, positions are counted from a block's first token. Tokens after the row are in a
    # document of their own and see each other: a softmax without any key would be nan.
    first = torch.arange(0, C * L, L, device=device)
    own = F.pad(starts, (0, C * L - T), value=T).unflatten(1, (C, L)) - first[:, None]
    t = torch.arange(L, device=device)
    s = torch.arange(-back, L, device=device)[:, None]
    begin = own.unsqueeze(2)  # (B, C, 1, L)
    in_window, until = (s <= t) & (t - s < window), s <= t
    in_band = (((s < begin + sinks) & until) | in_window) & (s >= begin)  # (B, C, span, L)

    # Sinks before the band belong to the document of its first token: a later one starts in it.
    low = first - back
    read = low.clamp(min=0)
    document = starts[:, read]  # (B, C)
    positions = document.unsqueeze(2) + torch.arange(sinks, device=device)
    before = positions < low[:, None]  # (B, C, N)
    same = own == (document - first).unsqueeze(2)  # (B, C, L)
    in_sinks = before.unsqueeze(3) & same.unsqueeze(2)
    # A document may have fewer than N tokens before the band: masked, but its index must be valid.
    gathered = torch.minimum(positions, read[:, None])
    return BandPlan(gathered, in_sinks, in_band, (own[..., 0] + back).clamp(min=0))
