"""Which document each token of a packed or padded row belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def document_segments(
    segment_ids: Tensor | None = None, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor | None:
    """Number the documents of each row from what the caller gave; None when every row is one document.

    A document ends where its given segment id changes, where positions do not go up by one (transformers' convention
    for packed rows), or where padding begins or ends. All arguments (B, T) or None; returns (B, T) int64 or None.
    """
    ends = None
    for ids, step in ((segment_ids, 0), (position_ids, 1), (attention_mask, 0)):
        if ids is None or ids.shape[-1] < 2:
            continue
        changed = ids[:, 1:].long() - ids[:, :-1].long() != step
        ends = changed if ends is None else ends | changed
    if ends is None or not bool(ends.any()):
        return None
    return torch.nn.functional.pad(ends.long().cumsum(dim=-1), (1, 0))


def positions_in_documents(segment_ids: Tensor) -> Tensor:
    """Count positions from each document's first token: (B, T) -> (B, T) int64."""
    batch, tokens = segment_ids.shape
    index = torch.arange(tokens, device=segment_ids.device).expand(batch, tokens)
    starts = torch.nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=-1).values
