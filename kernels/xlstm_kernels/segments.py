"""Documents of packed rows: runs of equal neighbouring segment ids."""

from __future__ import annotations

import torch
from torch import Tensor


def document_runs(segment_ids: Tensor) -> Tensor:
    """Number the documents of each row 0, 1, 2, ... in order.

    segment_ids (B, T) -> (B, T) int64. A document ends where the id changes; an id that returns
    later in the row (0, 1, 0) starts a new document.
    """
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.nn.functional.pad(changes, (1, 0)).cumsum(dim=1)


def document_starts(runs: Tensor) -> Tensor:
    """Find the position, in the row, of the first token of each token's document.

    runs (B, T), from `document_runs` -> (B, T) int64.
    """
    positions = torch.arange(runs.shape[1], device=runs.device).expand_as(runs)
    is_start = torch.nn.functional.pad(runs[:, 1:] != runs[:, :-1], (1, 0), value=True)
    return torch.where(is_start, positions, 0).cummax(dim=1).values
